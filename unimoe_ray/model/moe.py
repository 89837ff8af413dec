"""The sparse mixture-of-experts layer: a softmax top-k router over SwiGLU experts, dropless and deterministic.

Uni-MoE, section 3.2 (equations 14 to 17), as the released 4-expert code computes it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from unimoe_ray.model.compiled import combine_gradients
from unimoe_ray.model.experts import SwiGLU, mix_directly, run_experts
from unimoe_ray.model.routing import Routing, RoutingStats, route


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

    def forward(
        self, x: torch.Tensor, kinds: torch.Tensor | None = None, num_kinds: int = 1
    ) -> tuple[torch.Tensor, RoutingStats]:
        """``x`` [..., H] to ([..., H], stats). Every token passes through exactly K experts, whatever the load.

        kinds [T] int64: the kind of each token, below ``num_kinds``, for the statistics
        """
        tokens = x.reshape(-1, x.shape[-1])
        routing = route(tokens, self.gate.weight, self.top_k)
        y, counts = self.mix(tokens, routing)
        return y.view_as(x), RoutingStats(routing, counts, kinds, num_kinds)

    def mix(self, tokens: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [T, H] through their experts: [T, H], and the routed slots of each expert [E] int64."""
        mixed = mix_directly(self.experts, tokens, routing.experts, routing.weights)
        if mixed is not None:
            return mixed
        order, counts = sort_slots(routing.experts, self.num_experts)
        outputs = run_experts(self.experts, dispatch(tokens, order, self.top_k), counts.tolist())
        return combine(outputs, order, routing.weights), counts


def sort_slots(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots of experts [T, K] by expert, then by token: their indices [T*K] and how many each expert has [E].

    One stable sort makes the rows of an expert contiguous and keeps the summation order fixed.
    """
    slots = experts.reshape(-1)
    return slots.argsort(stable=True), torch.bincount(slots, minlength=num_experts)


def dispatch(tokens: torch.Tensor, order: torch.Tensor, top_k: int) -> torch.Tensor:
    """Tokens [T, H] as the rows of sorted slots [T*K, H]. Differentiable once."""
    if not torch.is_grad_enabled():
        return tokens.index_select(0, order // top_k)
    return _Dispatch.apply(tokens, order, top_k)


def combine(outputs: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Outputs of sorted slots [T*K, H] back to their tokens, weighted by weights [T, K], best first: [T, H].

    Differentiable once. Equal outputs with ``mixing_weights`` give the same again, bit for bit, for K up to 2.
    """
    weights = weights.to(outputs.dtype)
    if not torch.is_grad_enabled():
        return _sum_slots(outputs, order, weights.shape[1], weights)
    return _Combine.apply(outputs, order, weights)


def _sum_slots(rows: torch.Tensor, order: torch.Tensor, top_k: int, weights: torch.Tensor | None) -> torch.Tensor:
    """Rows of sorted slots, weighted, summed over the K of each token, in one pass.

    Of two the lesser weight goes first: its product is rounded by at most a quarter of the sum's last unit, which the
    second, fused, addition then rounds away where both rows are equal.
    """
    ranks = torch.arange(len(order), device=order.device)
    if weights is not None and top_k == 2:
        order, weights = order ^ 1, weights.flip(-1)
    inverse = torch.empty_like(order).scatter_(0, order, ranks)
    starts = ranks[::top_k].contiguous()
    weights = None if weights is None else weights.reshape(-1)
    return torch.embedding_bag(rows, inverse, starts, mode=0, per_sample_weights=weights)[0]


class _Dispatch(torch.autograd.Function):
    """Indexing whose backward adds the slots of a token in one pass, in a fixed order."""

    @staticmethod
    def forward(ctx, tokens: torch.Tensor, order: torch.Tensor, top_k: int) -> torch.Tensor:
        ctx.save_for_backward(order)
        ctx.top_k = top_k
        return tokens.index_select(0, order // top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        (order,) = ctx.saved_tensors
        return _sum_slots(grad.contiguous(), order, ctx.top_k, None), None, None


class _Combine(torch.autograd.Function):
    """``embedding_bag`` has no gradient for its table but a dense one of atomics: here it is a gather."""

    @staticmethod
    def forward(ctx, outputs: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(outputs, order, weights)
        return _sum_slots(outputs, order, weights.shape[1], weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        outputs, order, weights = ctx.saved_tensors
        found = combine_gradients(grad, outputs, order, weights)
        if found is not None:
            return found[0], None, found[1]
        upstream = grad.index_select(0, order // weights.shape[1])
        of_weights = torch.empty_like(weights)
        of_weights.view(-1)[order] = torch.linalg.vecdot(upstream, outputs)
        return upstream.mul_(weights.reshape(-1)[order].unsqueeze(-1)), None, of_weights
