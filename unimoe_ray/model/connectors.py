"""Connectors: features of a frozen tower to soft tokens in the language model's space."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from unimoe_ray.config.model import ConnectorConfig, VideoConfig
from unimoe_ray.model.features import Features


class MLPConnector(nn.Module):
    """LayerNorm, Linear, GELU, Linear on every feature token: one soft token each.

    With ``scale`` (the RMS of the text embeddings) the output is RMS-normed to it: a small language model can't read
    soft tokens of another magnitude.
    """

    def __init__(self, feature_dim: int, hidden_size: int, match_text_rms: bool):
        super().__init__()
        self.norm = nn.LayerNorm(feature_dim)
        self.input = nn.Linear(feature_dim, hidden_size)
        self.projection = nn.Linear(hidden_size, hidden_size)
        self.match_text_rms = match_text_rms
        self.register_buffer("scale", torch.ones(()))

    def project(self, values: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., H]."""
        y = self.projection(F.gelu(self.input(self.norm(values))))
        return F.rms_norm(y, y.shape[-1:], eps=1e-5) * self.scale if self.match_text_rms else y

    def forward(self, features: Features) -> Features:
        """One soft token per feature token; windows of one file stay in order."""
        return Features(self.project(features.values), features.lengths, features.owner)

    @staticmethod
    def soft_tokens(window_lengths: list[int]) -> int:
        """Soft tokens of a file whose windows have these many feature tokens."""
        return sum(window_lengths)


class VideoConnector(MLPConnector):
    """An MLP connector for frames of one image tower. The windows of a file are its frames, N patches each, N square.

    ``frames``: patches are merged over space and time first (as Qwen2-VL's patch merger, arXiv 2409.12191, 2.1), so
    one soft token sees a block of ``temporal_merge`` frames; ``mean``: averaged over the frames after the projection
    (the released Uni-MoE code).
    """

    def __init__(self, feature_dim: int, hidden_size: int, match_text_rms: bool, video: VideoConfig):
        merged = (
            feature_dim * video.spatial_merge**2 * video.temporal_merge if video.pooling == "frames" else feature_dim
        )
        super().__init__(merged, hidden_size, match_text_rms)
        self.video = video

    def forward(self, features: Features) -> Features:
        frames = self.video.frames
        files, n = len(features.values) // frames, features.values.shape[1]
        values = features.values.view(files, frames, n, -1)
        if self.video.pooling == "mean":
            soft = self.project(values).mean(dim=1)
        else:
            soft = self.project(merge_patches(values, self.video.spatial_merge, self.video.temporal_merge))
        lengths = features.lengths.new_full((files,), soft.shape[1])
        return Features(soft, lengths, features.owner[::frames])

    def soft_tokens(self, window_lengths: list[int]) -> int:
        if self.video.pooling == "mean":
            return window_lengths[0]
        return sum(window_lengths) // (self.video.spatial_merge**2 * self.video.temporal_merge)


def merge_patches(values: torch.Tensor, spatial: int, temporal: int) -> torch.Tensor:
    """[B, frames, N, D], N a square grid, to [B, frames*N/(temporal*spatial^2), temporal*spatial^2*D], time first."""
    b, frames, n, d = values.shape
    side = round(n**0.5)
    if side * side != n or side % spatial:
        raise ValueError(f"a frame has {n} patches; a square grid whose side {spatial} divides is needed")
    grid = values.view(b, frames // temporal, temporal, side // spatial, spatial, side // spatial, spatial, d)
    return grid.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, -1, temporal * spatial * spatial * d)


def build_connector(
    modality: str, feature_dim: int, hidden_size: int, connector: ConnectorConfig, video: VideoConfig
) -> MLPConnector:
    if modality == "video":
        return VideoConnector(feature_dim, hidden_size, connector.match_text_rms, video)
    return MLPConnector(feature_dim, hidden_size, connector.match_text_rms)
