"""What only the official 8-expert code computes, as reference functions: its gate, its layer and its extra losses.

They show what published numbers are made of and are compared with the official outputs; the model itself stays
dropless and deterministic (``model.moe``). Kept as they are there, oddities included:

- The second expert is the best one after Gumbel noise on the logits, at inference too; the weights p1 / (p1 + p2) do
  not see the noise, but the logits that the layer returns do.
- With a capacity, first choices take an expert's slots before any second choice does, in token order.
- The KL loss passes distributions through softmax again, and the pair image and video is missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

KL_PAIRS = (("image", "audio"), ("image", "text"), ("audio", "text"), ("audio", "video"), ("video", "text"))
Ranges = Mapping[str, Sequence[Sequence[Sequence[int]]]]
"""By modality, for each sample: [start, end) of its stretches of tokens."""


@dataclass
class Gating:
    """weights [T, E]: how much of each expert a token takes; counts [E] int64: tokens per expert before any is dropped;
    capacity: slots of each expert; balance_loss: scalar, 1 when balanced; logits [T, E]: with the noise, if any."""

    weights: torch.Tensor
    counts: torch.Tensor
    capacity: int
    balance_loss: torch.Tensor
    logits: torch.Tensor


def top2_gate(logits: torch.Tensor, noise: torch.Tensor | None = None, capacity_factor: float | None = None) -> Gating:
    """logits [T, E] fp32, noise [T, E] Gumbel samples. ``capacity_factor`` times T / E slots for each expert, rounded
    up; without it every expert has as many as the fullest one needs (the released setting)."""
    tokens, experts = logits.shape
    probability = logits.softmax(-1)
    first = F.one_hot(logits.argmax(-1), experts)
    noisy = logits if noise is None else logits + noise
    second = F.one_hot(noisy.masked_fill(first.bool(), -torch.inf).argmax(-1), experts)
    counts = (first + second).sum(0)
    if capacity_factor is None:
        capacity = int(counts.max())
    else:
        capacity = math.ceil(tokens / experts * capacity_factor)
        slot_of_first = first.cumsum(0) - 1
        slot_of_second = second.cumsum(0) - 1 + first.sum(0)
        first = first * (slot_of_first < capacity)
        second = second * (slot_of_second < capacity)
    kept = probability * (first + second)
    weights = kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(kept.dtype).eps)
    return Gating(weights, counts, capacity, balance_loss(logits), noisy)


def balance_loss(logits: torch.Tensor) -> torch.Tensor:
    """E * sum_e(mean probability_e * share of tokens whose first choice is e), logits [T, E] without noise. Summed over
    layers in the official code, padding included."""
    experts = logits.shape[-1]
    share = F.one_hot(logits.argmax(-1), experts).to(logits.dtype).mean(0)
    return experts * (logits.softmax(-1).mean(0) * share).sum()


def moe_layer(
    x: torch.Tensor, weights: Mapping[str, torch.Tensor], lora_scaling: float, noise: torch.Tensor | None = None
) -> tuple[torch.Tensor, Gating]:
    """One layer with all its experts in one process, [..., H] to ([..., H], gating).

    weights: by their names below ``model.layers.N.mlp.``: ``deepspeed_moe.gate.wg.weight`` and, of each expert,
    ``deepspeed_moe.experts.deepspeed_experts.E.{gate,up,down}_proj{,_lora_A,_lora_B}.weight``.
    lora_scaling: alpha / r
    """
    tokens = x.reshape(-1, x.shape[-1])
    gating = top2_gate(F.linear(tokens.float(), weights["deepspeed_moe.gate.wg.weight"].float()), noise)
    y = torch.zeros_like(tokens)
    for expert in range(gating.weights.shape[1]):
        prefix = f"deepspeed_moe.experts.deepspeed_experts.{expert}."

        def project(values: torch.Tensor, name: str, prefix: str = prefix) -> torch.Tensor:
            low = F.linear(values, weights[f"{prefix}{name}_lora_A.weight"])
            added = F.linear(low, weights[f"{prefix}{name}_lora_B.weight"])
            return F.linear(values, weights[f"{prefix}{name}.weight"]) + lora_scaling * added

        rows = gating.weights[:, expert].nonzero().squeeze(-1)
        hidden = F.silu(project(tokens[rows], "gate_proj")) * project(tokens[rows], "up_proj")
        y = y.index_add(0, rows, gating.weights[rows, expert, None].to(y.dtype) * project(hidden, "down_proj"))
    return y.view_as(x), gating


def multimodal_loss(logits: torch.Tensor, ranges: Ranges, experts: Mapping[str, Sequence[int]]) -> torch.Tensor:
    """Of one layer, logits [B, S, E]: how far the probabilities are from 1 at a modality's own experts and 0 at others
    (mean absolute difference), weighted by the modality's share of the sequence; summed over samples and modalities."""
    probability = logits.softmax(-1)
    loss = logits.new_zeros(())
    for modality, own in experts.items():
        target = logits.new_zeros(logits.shape[-1])
        target[list(own)] = 1.0
        for row, index in _tokens_of(ranges, modality):
            loss = loss + len(index) / logits.shape[1] * (probability[row, index] - target).abs().mean()
    return loss


def kl_loss(logits: torch.Tensor, ranges: Ranges) -> torch.Tensor:
    """Of one layer, logits [B, S, E]: 1 - KL between the mean gate distributions of two modalities, averaged over the
    pairs that a sample has, summed over samples. It pushes modalities to different experts.

    For a pair (a, b) it is KL(b || a) here. The official outputs at hand don't tell it from KL(a || b): after the
    second softmax both are so flat that the two agree to single precision.
    """
    probability = logits.softmax(-1)
    means: list[dict[str, torch.Tensor]] = [{} for _ in logits]
    for modality in ranges:
        for row, index in _tokens_of(ranges, modality):
            means[row][modality] = probability[row, index].mean(0)
    loss = logits.new_zeros(())
    for mean in means:
        present = [(mean[a], mean[b]) for a, b in KL_PAIRS if a in mean and b in mean]
        if present:
            # Of one-dimensional input "batchmean" divides by E.
            divergences = [F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="sum") / len(a) for a, b in present]
            loss = loss + (1 - torch.stack(divergences)).mean()
    return loss


def _tokens_of(ranges: Ranges, modality: str) -> list[tuple[int, list[int]]]:
    """(sample, its token positions) of the samples that have the modality."""
    found = []
    for row, stretches in enumerate(ranges.get(modality, [])):
        index = [position for start, end in stretches for position in range(start, end)]
        if index:
            found.append((row, index))
    return found
