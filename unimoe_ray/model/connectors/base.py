"""What every connector shares."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from unimoe_ray.model.features import Features


class Connector(nn.Module):
    """Features [B, N, D] to soft tokens [B, M, H], windows of one file in order.

    A subclass gives ``forward``, ``soft_tokens`` and ``projection``: the linear part that stage 3 trains.

    With ``match_text_rms`` the output is RMS-normed to ``scale`` (the RMS of the text embeddings): a small language
    model can't read soft tokens of another magnitude. The published model does without.
    """

    projection: nn.Module
    scale: torch.Tensor

    def __init__(self, match_text_rms: bool):
        super().__init__()
        self.match_text_rms = match_text_rms
        self.register_buffer("scale", torch.ones(()), persistent=match_text_rms)

    def rescale(self, soft: torch.Tensor) -> torch.Tensor:
        """[..., H] to the RMS of the text, if asked for."""
        return F.rms_norm(soft, soft.shape[-1:], eps=1e-5) * self.scale if self.match_text_rms else soft

    def forward(self, features: Features) -> Features:
        raise NotImplementedError

    def soft_tokens(self, window_lengths: list[int]) -> int:
        """Soft tokens of a file whose windows have these many feature tokens."""
        raise NotImplementedError
