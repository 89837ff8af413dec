"""Connectors for the frames of one image tower. The windows of a file are its frames, N patches each, N square.

``mean``: averaged over the frames after the projection (the released Uni-MoE code; the GELU makes the order matter).
``frames``: patches are merged over space and time first (as Qwen2-VL's patch merger, arXiv 2409.12191, 2.1), so one
soft token sees a block of ``temporal_merge`` frames.
"""

from __future__ import annotations

import torch

from unimoe_ray.config.model import VideoConfig
from unimoe_ray.model.connectors.mlp import GeluProjector, MLPConnector, TokenwiseConnector
from unimoe_ray.model.features import Features


class FramePooling(TokenwiseConnector):
    """Mixed in before the connector that projects."""

    def __init__(self, feature_dim: int, hidden_size: int, match_text_rms: bool, video: VideoConfig):
        block = video.spatial_merge**2 * video.temporal_merge if video.pooling == "frames" else 1
        super().__init__(feature_dim * block, hidden_size, match_text_rms)
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


class VideoConnector(FramePooling, MLPConnector):
    """``mlp``."""


class VideoProjector(FramePooling, GeluProjector):
    """``mlp2x_gelu``."""


def merge_patches(values: torch.Tensor, spatial: int, temporal: int) -> torch.Tensor:
    """[B, frames, N, D], N a square grid, to [B, frames*N/(temporal*spatial^2), temporal*spatial^2*D], time first."""
    b, frames, n, d = values.shape
    side = round(n**0.5)
    if side * side != n or side % spatial:
        raise ValueError(f"a frame has {n} patches; a square grid whose side {spatial} divides is needed")
    grid = values.view(b, frames // temporal, temporal, side // spatial, spatial, side // spatial, spatial, d)
    return grid.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, -1, temporal * spatial * spatial * d)
