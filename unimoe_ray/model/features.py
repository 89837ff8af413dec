"""What towers and connectors exchange.

Shape letters, here and everywhere in the package: B batch, S sequence, T tokens (B*S), H hidden, F intermediate,
E experts, K top-k, M soft tokens, D feature dim, N tokens per window, V vocabulary, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch


@dataclass
class Features:
    """A padded batch of feature windows (an image, a video frame, 30 s of audio, ...).

    values  [B, N, D] float: features or soft tokens, zero beyond ``lengths``
    lengths [B] int64: valid tokens of each window
    owner   [B] int64: index of the media file that each window belongs to, non-decreasing
    """

    values: torch.Tensor
    lengths: torch.Tensor
    owner: torch.Tensor

    def to(self, device: torch.device | str) -> Features:
        return Features(self.values.to(device), self.lengths.to(device), self.owner.to(device))


@runtime_checkable
class Tower(Protocol):
    """A frozen encoder of one modality. ``media`` is one decoded file: an RGB ``PIL.Image`` for images,
    a list of them for a video, a float32 mono waveform at 16 kHz ([samples], numpy) for sound and speech."""

    name: str
    modality: str
    feature_dim: int

    def preprocess(self, media) -> np.ndarray:
        """One file to the tower's input windows [W, ...] (float32)."""

    def __call__(self, batch: list[np.ndarray]) -> Features:
        """Encode the windows of several files; ``owner`` is the index in ``batch``."""

    def tokens_for(self, media) -> list[int]:
        """Number of feature tokens of each window of one file, without encoding it."""

    def fingerprint(self) -> str:
        """A hash of weights and settings: the same fingerprint gives the same features."""
