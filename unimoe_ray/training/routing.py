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
    """
    whole = sums.over_kinds()
    routed, tokens = whole.routed[:, 0], whole.tokens
    share = routed / routed.sum(-1, keepdim=True).clamp(min=1)
    entropy = (whole.entropy / tokens.clamp(min=1))[:, 0]
    occurred = [g for g in range(len(TOKEN_KINDS)) if sums.tokens[:, g].any()]
    return {
        "expert_load": _rounded(share),
        "expert_tokens": {TOKEN_KINDS[g]: sums.routed[:, g].long().tolist() for g in occurred},
        "router_entropy": _rounded(entropy),
    }


def _rounded(tensor: torch.Tensor) -> list:
    return torch.round(tensor.double(), decimals=4).tolist()
