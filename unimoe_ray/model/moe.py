"""The sparse mixture-of-experts layer: a softmax top-k router over SwiGLU experts, dropless and deterministic.

Uni-MoE, section 3.2 (equations 14 to 17), as the released 4-expert code computes it: softmax over the k selected
logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class RoutingStats:
    """What the router did with one batch of T tokens.

    tokens_per_expert [E] int64: routed slots (each token fills K)
    mean_probability  [E] fp32: mean over tokens of the softmax over all experts
    balance_loss      scalar fp32: E * sum_e(mean_probability_e * share_e), share_e the part of the T*K routed slots;
                      1 when balanced (Switch Transformer, equation 4, with both choices counted)
    experts           [T, K] int64: chosen experts of each token, best first
    """

    tokens_per_expert: torch.Tensor
    mean_probability: torch.Tensor
    balance_loss: torch.Tensor
    experts: torch.Tensor


class SwiGLU(nn.Module):
    """LLaMA's feed-forward block without biases: down(silu(gate(x)) * up(x)), [..., H] to [..., H]."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoELayer(nn.Module):
    """E experts, K of them per token. State-dict keys: ``gate.weight`` [E, H] and ``experts.{e}.*_proj.weight``."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int, top_k: int):
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}; allowed: 1 to num_experts ({num_experts})")
        self.num_experts, self.top_k = num_experts, top_k
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)
        nn.init.normal_(self.gate.weight, std=0.02)
        self.experts = nn.ModuleList(SwiGLU(hidden_size, intermediate_size) for _ in range(num_experts))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, RoutingStats]:
        """``x`` [..., H] to ([..., H], stats). Every token passes through exactly K experts, whatever the load."""
        tokens = x.reshape(-1, x.shape[-1])
        with torch.autocast(tokens.device.type, enabled=False):  # it would route in bf16
            dtype = torch.promote_types(tokens.dtype, torch.float32)
            logits = F.linear(tokens.to(dtype), self.gate.weight.to(dtype))
        top_logits, top_experts = logits.topk(self.top_k, dim=-1)
        weights = top_logits.softmax(dim=-1)

        # One stable sort makes the rows of an expert contiguous and keeps the summation order fixed.
        slots = top_experts.reshape(-1)
        order = slots.argsort(stable=True)
        counts = torch.bincount(slots, minlength=self.num_experts)
        rows = tokens[order // self.top_k].split(counts.tolist())
        # Experts without tokens run on zero rows: their gradients must exist on every rank.
        outputs = torch.cat([expert(chunk) for expert, chunk in zip(self.experts, rows, strict=True)])
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        routed = outputs[inverse].view(*top_experts.shape, x.shape[-1])
        y = (routed * weights.unsqueeze(-1).to(routed.dtype)).sum(dim=1)

        probability = logits.softmax(dim=-1).mean(dim=0) if len(tokens) else logits.new_zeros(self.num_experts)
        share = counts.to(dtype) / max(len(slots), 1)
        stats = RoutingStats(counts, probability, self.num_experts * (probability * share).sum(), top_experts)
        return y.view_as(x), stats
