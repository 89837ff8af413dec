"""Frozen encoders behind one interface, ``unimoe_ray.model.features.Tower``.

Each module has the network (an ``nn.Module`` filled by ``load_state_dict``) and the tower around it. Nothing here reads
files: ``unimoe_ray.towers`` does for the published ones, ``unimoe_ray.mini.towers`` for the small pretrained ones.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import numpy as np
import torch
from torch import nn

from unimoe_ray.model.features import Features

SAMPLE_RATE = 16_000


class FrozenTower(nn.Module):
    """What every tower shares: always in evaluation mode and without gradients, batching, padding, the fingerprint.

    A subclass gives ``name``, ``modality``, ``feature_dim``, ``settings`` (whatever besides the weights decides the
    features; JSON), ``chunk_elements`` (numbers of one window's input times windows that fit in one pass) and
    ``preprocess``, ``tokens_for``, ``encode``.
    """

    name: str
    modality: str
    feature_dim: int
    chunk_elements: int

    def __init__(self, network: nn.Module, settings: dict[str, Any]):
        super().__init__()
        self.network = network
        self.settings = settings
        self._fingerprint: str | None = None
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenTower:
        """Stays in evaluation mode, whatever the model around it does."""
        return super().train(False)

    def encode(self, windows: torch.Tensor) -> torch.Tensor:
        """Windows of one shape [B, ...] to features [B, N, D]."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, batch: list[np.ndarray]) -> Features:
        """Encode the windows of several files, each [W, ...] float32 as ``preprocess`` made them; ``owner`` is the
        index in ``batch``. Windows of equal shape go through the network together, a bounded number at a time, so that
        a file has the same features (to rounding) in any company."""
        parameter = next(self.parameters())
        counts = torch.tensor([len(windows) for windows in batch], dtype=torch.int64)
        starts = (torch.cumsum(counts, 0) - counts).tolist()
        shapes: dict[tuple[int, ...], list[int]] = {}
        for index, windows in enumerate(batch):
            shapes.setdefault(windows.shape[1:], []).append(index)
        done: list[tuple[torch.Tensor, torch.Tensor]] = []
        for shape, members in shapes.items():
            rows = torch.cat([torch.arange(len(batch[i])) + starts[i] for i in members])
            stacked = torch.from_numpy(np.concatenate([batch[i] for i in members]))
            chunk = max(1, self.chunk_elements // math.prod(shape))
            for at, part in zip(rows.split(chunk), stacked.split(chunk), strict=True):
                done.append((at, self.encode(part.to(parameter.device, parameter.dtype))))
        total = int(counts.sum())
        lengths = torch.zeros(total, dtype=torch.int64)
        longest = max((part.shape[1] for _, part in done), default=0)
        values = torch.zeros(total, longest, self.feature_dim, device=parameter.device, dtype=parameter.dtype)
        for at, part in done:
            lengths[at] = part.shape[1]
            values[at.to(values.device), : part.shape[1]] = part
        owner = torch.repeat_interleave(torch.arange(len(batch)), counts)
        return Features(values, lengths.to(values.device), owner.to(values.device))

    def fingerprint(self) -> str:
        """sha256 of name, settings and weights, computed once."""
        if self._fingerprint is None:
            digest = hashlib.sha256(json.dumps([self.name, self.settings], sort_keys=True).encode())
            for key, tensor in sorted(self.network.state_dict().items()):
                digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


def randomise(network: nn.Module, seed: int) -> None:
    """Seeded random weights that keep the signal's scale through a deep stack of ReLU layers (the default ones of torch
    let it die out). Leaves torch's global generator alone."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_in), generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
