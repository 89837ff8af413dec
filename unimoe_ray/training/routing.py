"""What the routers did in a step, over all ranks, as numbers for ``metrics.jsonl``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from unimoe_ray.config.model import TOKEN_KINDS
from unimoe_ray.model.routing import RoutingSums


def over_ranks(sums: RoutingSums) -> RoutingSums:
    """The sums of all ranks, in one collective."""
    tensors = sums.tensors()
    flat = torch.cat([tensor.double().reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return RoutingSums(*(part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)))


def routing_metrics(sums: RoutingSums) -> dict[str, Any]:
    """Of sums with fields [L, G, ...], G kinds of token as in ``TOKEN_KINDS``:

    expert_load     [L][E] share of the routed slots
    expert_tokens   {kind: [L][E]} routed slots, of kinds that occurred
    router_entropy  [L] mean over tokens, in nats (log E: undecided, 0: certain)
    load_cv         [L] coefficient of variation of the loads (0: even; at most sqrt(E/K - 1): all to the same K)
    busiest_expert  [L] that of the most first choices
    busiest_share   [L] its share of the tokens' first choices (1/E: even; 1: all)
    """
    whole = sums.over_kinds()
    routed, first, tokens = whole.routed[:, 0].double(), whole.first[:, 0].double(), whole.tokens
    share = routed / routed.sum(-1, keepdim=True).clamp(min=1)
    entropy = (whole.entropy / tokens.clamp(min=1))[:, 0]
    most, busiest = (first / tokens.clamp(min=1)).max(-1)
    occurred = [g for g in range(len(TOKEN_KINDS)) if sums.tokens[:, g].any()]
    return {
        "expert_load": _rounded(share),
        "expert_tokens": {TOKEN_KINDS[g]: sums.routed[:, g].long().tolist() for g in occurred},
        "router_entropy": _rounded(entropy),
        "load_cv": _rounded(share.std(-1, correction=0) / share.mean(-1).clamp(min=1e-12)),
        "busiest_expert": busiest.tolist(),
        "busiest_share": _rounded(most),
    }


def idle_experts(metrics: dict[str, Any], before: list[list[int]]) -> list[list[int]]:
    """Experts without a token in this step, as [layer, expert, for how many steps by now].

    ``before``: what this function gave for the step before, [] at the first.
    """
    counts = list(metrics["expert_tokens"].values())
    earlier = {(layer, expert): steps for layer, expert, steps in before}
    return [
        [layer, expert, earlier.get((layer, expert), 0) + 1]
        for layer, rows in enumerate(zip(*counts, strict=True))
        for expert, tokens in enumerate(zip(*rows, strict=True))
        if not any(tokens)
    ]


def _rounded(tensor: torch.Tensor) -> list:
    return torch.round(tensor.double(), decimals=4).tolist()
