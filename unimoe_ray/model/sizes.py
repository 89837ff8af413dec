"""Counting parameters; on the meta device, too, where a model of any size takes no memory."""

from __future__ import annotations

from torch import nn

from unimoe_ray.model.moe import MoELayer


def total(module: nn.Module) -> int:
    """All parameters, those that are tied once."""
    return sum(parameter.numel() for parameter in module.parameters())


def active_per_token(module: nn.Module) -> int:
    """Those that one token passes: of each mixture the router and top-k experts (Uni-MoE, table 9, "activated")."""
    idle = 0
    for layer in module.modules():
        if isinstance(layer, MoELayer):
            idle += (layer.num_experts - layer.top_k) * total(layer.experts[0])
    return total(module) - idle


def in_experts(module: nn.Module) -> int:
    """Those of all experts of all mixtures, without routers."""
    return sum(total(layer.experts) for layer in module.modules() if isinstance(layer, MoELayer))
