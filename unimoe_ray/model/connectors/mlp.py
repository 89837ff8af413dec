"""Connectors that make one soft token of every feature token."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from unimoe_ray.model.connectors.base import Connector
from unimoe_ray.model.features import Features


class TokenwiseConnector(Connector):
    """One soft token per feature token, by the subclass's ``project``."""

    def project(self, values: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., H]."""
        raise NotImplementedError

    def forward(self, features: Features) -> Features:
        return Features(self.project(features.values), features.lengths, features.owner)

    def soft_tokens(self, window_lengths: list[int]) -> int:
        return sum(window_lengths)


class MLPConnector(TokenwiseConnector):
    """LayerNorm, Linear, GELU, Linear."""

    def __init__(self, feature_dim: int, hidden_size: int, match_text_rms: bool):
        super().__init__(match_text_rms)
        self.norm = nn.LayerNorm(feature_dim)
        self.input = nn.Linear(feature_dim, hidden_size)
        self.projection = nn.Linear(hidden_size, hidden_size)

    def project(self, values: torch.Tensor) -> torch.Tensor:
        return self.rescale(self.projection(F.gelu(self.input(self.norm(values)))))


class GeluProjector(TokenwiseConnector):
    """Linear, GELU, Linear: ``mlp2x_gelu`` of LLaVA-1.5, the ``mm_projector`` of the published model. Its keys
    ``mm_projector.{0,2}.*`` are ``projection.{0,2}.*`` here; stage 3 trains all of it."""

    def __init__(self, feature_dim: int, hidden_size: int, match_text_rms: bool = False):
        super().__init__(match_text_rms)
        self.projection = nn.Sequential(
            nn.Linear(feature_dim, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )

    def project(self, values: torch.Tensor) -> torch.Tensor:
        return self.rescale(self.projection(values))
