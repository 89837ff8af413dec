"""A model as if one of its experts were not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from unimoe_ray.model.language import mixtures
from unimoe_ray.model.unimoe import UniMoE


@contextmanager
def without_expert(model: UniMoE, expert: int) -> Iterator[None]:
    """In every mixture, ``expert`` is taken out and its router row with it: its tokens go to the best of the others.
    Raises ValueError where there is no such expert, or no other."""
    layers = mixtures(model)
    for layer in layers:
        if not (0 <= expert < layer.num_experts and layer.num_experts > 1):
            raise ValueError(f"expert {expert} of {layer.num_experts} can't be switched off")
    before = [(layer.gate, layer.experts, layer.num_experts, layer.top_k) for layer in layers]
    try:
        for layer in layers:
            rest = [e for e in range(layer.num_experts) if e != expert]
            gate = nn.Linear(layer.gate.in_features, len(rest), bias=False, device="meta")
            gate.weight = nn.Parameter(layer.gate.weight.detach()[rest], requires_grad=False)
            layer.gate, layer.experts = gate, nn.ModuleList(layer.experts[e] for e in rest)
            layer.num_experts, layer.top_k = len(rest), min(layer.top_k, len(rest))
        yield
    finally:
        for layer, (gate, experts, number, top_k) in zip(layers, before, strict=True):
            layer.gate, layer.experts, layer.num_experts, layer.top_k = gate, experts, number, top_k
