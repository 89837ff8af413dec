"""The experts of a mixture, and how rows sorted by expert pass through them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, compress

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

# On CPUs the product of few rows with a [F, H] weight is up to 1.6 times faster as ``weight @ rows.T``: there MKL reads
# the weight as its packed operand's partner. Measured from 6 rows to this many; below, and on GPUs, it is not.
FEW_ROWS = range(6, 160)
# On GPUs a grouped product replaces the launches of each expert, but wants the weights in one stack: worth copying
# them while a weight is no larger than this. Reasoned from bandwidths and launch times, not measured.
GROUPED_BYTES = 4 << 20


class SwiGLU(nn.Module):
    """LLaMA's feed-forward block without biases: down(silu(gate(x)) * up(x)), [..., H] to [..., H]."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def run_experts(experts: Iterable[nn.Module], rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """``rows`` [N, H], the first counts[0] of them for the first expert and so on, to [N, H]; bf16 under autocast.

    An expert without rows takes part: its gradients are zeros, not missing, as reducing them over ranks needs.
    Experts that are anything but plain ``SwiGLU`` (adapters in place of the projections, hooks) run as modules.
    Differentiable once.
    """
    counts = list(counts)
    differentiable = torch.is_grad_enabled()
    if not differentiable:
        experts, rows_of = list(compress(experts, counts)), list(filter(None, counts))
    else:
        experts, rows_of = list(experts), counts
    found = [_plain_weights(expert) for expert in experts]
    if torch_module._has_any_global_hook() or not all(found):
        parts = zip(experts, rows.split(rows_of), strict=True)
        return torch.cat([expert(part) for expert, part in parts])
    device = rows.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            found = [tuple(weight.to(dtype) for weight in weights) for weights in found]
            return _run_plain(found, rows.to(dtype), rows_of)
    return _run_plain(found, rows, rows_of)


def _run_plain(weights: list[tuple[torch.Tensor, ...]], rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
    if rows.is_cuda and rows.dtype is torch.bfloat16 and weights and weights[0][0].nbytes <= GROUPED_BYTES:
        return run_grouped(weights, rows, torch.tensor(counts, device=rows.device))
    if torch.is_grad_enabled():
        return _Experts.apply(rows, counts, *chain.from_iterable(weights))
    return _run(weights, rows, counts)[0]


def run_grouped(weights: Sequence[tuple[torch.Tensor, ...]], rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """As ``run_experts`` of the (gate, up, down) ``weights`` of each expert, with three grouped products."""
    ends = counts.cumsum(0).to(torch.int32)
    gate, up, down = (torch.stack(of_experts).transpose(-2, -1) for of_experts in zip(*weights, strict=True))
    hidden = F.silu(F.grouped_mm(rows, gate, offs=ends)) * F.grouped_mm(rows, up, offs=ends)
    return F.grouped_mm(hidden, down, offs=ends)


def _plain_weights(expert: nn.Module) -> tuple[torch.Tensor, ...] | None:
    """Gate, up and down, if they are all that the expert does. Reads the modules' dicts: attribute access is slow."""
    if type(expert) is not SwiGLU or _hooked(expert):
        return None
    weights = []
    for name in ("gate_proj", "up_proj", "down_proj"):
        projection = expert._modules[name]
        if type(projection) is not nn.Linear or _hooked(projection):
            return None
        weights.append(projection._parameters["weight"])
    return tuple(weights)


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class _Experts(torch.autograd.Function):
    """Rows sorted by expert through the experts, whose weights come as gate, up, down, gate, up, ...

    Of the inner activations only the two products are kept; the gradient of a weight is written once, where it stays.
    """

    @staticmethod
    def forward(ctx, rows: torch.Tensor, counts: list[int], *weights: torch.Tensor) -> torch.Tensor:
        triples = list(zip(weights[0::3], weights[1::3], weights[2::3], strict=True))
        outputs, kept = _run(triples, rows, counts)
        ctx.counts = counts
        ctx.save_for_backward(rows, *weights, *kept)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        rows, *saved = ctx.saved_tensors
        weights, kept = saved[: 3 * len(ctx.counts)], iter(saved[3 * len(ctx.counts) :])
        needed, needs_rows = ctx.needs_input_grad[2:], ctx.needs_input_grad[0]
        grad = grad.contiguous()
        of_rows = torch.empty_like(rows) if needs_rows else None
        of_weights: list[torch.Tensor | None] = []
        start = 0
        for e, count in enumerate(ctx.counts):
            own, wanted = weights[3 * e : 3 * e + 3], needed[3 * e : 3 * e + 3]
            if count:
                part = slice(start, start + count)
                into = of_rows[part] if needs_rows else None
                of_weights += _backward(rows[part], own, next(kept), next(kept), grad[part], into, wanted)
            else:
                of_weights += [torch.zeros_like(w) if want else None for w, want in zip(own, wanted, strict=True)]
            start += count
        return of_rows, None, *of_weights


def _run(
    weights: Sequence[tuple[torch.Tensor, ...]], rows: torch.Tensor, counts: list[int]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Outputs [N, H], and gate(x) and up(x) of every expert that has rows."""
    outputs, kept = torch.empty_like(rows), []
    parts = zip(counts, rows.split(counts), outputs.split(counts), weights, strict=True)
    for count, x, y, (gate, up, down) in parts:
        if not count:
            continue
        if count in FEW_ROWS and x.is_cpu:
            turned = x.t().contiguous()
            g, u = torch.mm(gate, turned).t(), torch.mm(up, turned).t()
            y.copy_(torch.mm(down, F.silu(g).mul_(u).t()).t())
        else:
            g, u = F.linear(x, gate), F.linear(x, up)
            torch.mm(F.silu(g).mul_(u), down.t(), out=y)
        kept += [g, u]
    return outputs, kept


def _backward(x, weights, g, u, grad, of_x, wanted) -> list[torch.Tensor | None]:
    """Gradients of one expert's (gate, up, down) as far as ``wanted``; that of x [M, H] goes into ``of_x``."""
    gate, up, down = weights
    of_hidden = torch.mm(grad, down)
    if of_hidden.stride() != g.stride():  # as the products were laid out
        of_hidden = torch.empty_like(g).copy_(of_hidden)
    activated = F.silu(g)
    of_down = torch.mm(grad.t(), activated * u) if wanted[2] else None
    of_u = activated.mul_(of_hidden)
    of_g = torch.ops.aten.silu_backward(of_hidden.mul_(u), g)
    if of_x is not None:
        torch.mm(of_g, gate, out=of_x).addmm_(of_u, up)
    of_gate = torch.mm(of_g.t(), x) if wanted[0] else None
    of_up = torch.mm(of_u.t(), x) if wanted[1] else None
    return [of_gate, of_up, of_down]
