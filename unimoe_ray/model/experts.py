"""The experts of a mixture, and how rows sorted by expert pass through them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    """LLaMA's feed-forward block without biases: down(silu(gate(x)) * up(x)), [..., H] to [..., H]."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def run_experts(experts: Sequence[nn.Module], rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """``rows`` [N, H], the first counts[0] of them for the first expert and so on, to [N, H].

    An expert without rows takes part: its gradients are zeros, not missing, as reducing them over ranks needs.
    """
    return torch.cat([expert(chunk) for expert, chunk in zip(experts, rows.split(list(counts)), strict=True)])
