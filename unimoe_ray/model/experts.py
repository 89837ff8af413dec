"""The experts of a mixture, and how rows sorted by expert pass through them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from unimoe_ray.model.compiled import MAX_ROWS, Weights, mix_few_tokens, run_few_rows, weight_gradient

# On CPUs the product of few rows with a [F, H] weight is up to 1.6 times faster as ``weight @ rows.T`` (MKL). Measured
# for these numbers of rows; with fewer it is slower, with more turning the rows costs what it gains.
TURNED_ROWS = range(12, 65)
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


class Projection(NamedTuple):
    """What a projection computes: x @ (weight + scale * b @ a).T, dropout on the way to a. Without an adapter a and b
    are None.

    weight [out, in]; a [R, in]; b [out, R]
    """

    weight: torch.Tensor
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 0.0
    dropout: float = 0.0

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self[:3]


Expert = tuple[Projection, Projection, Projection]  # gate, up, down


# Told the gradient of rows [N, H] while those of the weights are still to be computed.
Early = Callable[[torch.Tensor], None]


def run_experts(
    experts: Iterable[nn.Module], rows: torch.Tensor, counts: Sequence[int], early: Early | None = None
) -> torch.Tensor:
    """``rows`` [N, H], the first counts[0] of them for the first expert and so on, to [N, H]; bf16 under autocast.

    An expert without rows takes part: its gradients are zeros, not missing, as reducing them over ranks needs.
    ``SwiGLU`` experts, LoRA adapters included, take a direct way, differentiable once. Others (hooks, projections of
    another kind) run as modules.
    """
    experts, counts = list(experts), list(counts)
    if not torch.is_grad_enabled():
        experts, counts = list(compress(experts, counts)), [count for count in counts if count]
    found = [_read(expert) for expert in experts]
    if not all(found) or torch_module._has_any_global_hook():
        parts = zip(experts, rows.split(counts), strict=True)
        return torch.cat([expert(part) for expert, part in parts]) if experts else torch.empty_like(rows)
    device = rows.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            cast = [tuple(_cast(p, dtype) for p in expert) for expert in found]
            return _run_read(cast, rows.to(dtype), counts, early)
    return _run_read(found, rows, counts, early)


def run_grouped(experts: Sequence[Expert], rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """As ``run_experts`` without adapters, with three grouped products."""
    ends = counts.cumsum(0).to(torch.int32)
    gate, up, down = (torch.stack([p.weight for p in of]).transpose(-2, -1) for of in zip(*experts, strict=True))
    hidden = F.silu(F.grouped_mm(rows, gate, offs=ends)) * F.grouped_mm(rows, up, offs=ends)
    return F.grouped_mm(hidden, down, offs=ends)


def _run_read(experts: list[Expert], rows: torch.Tensor, counts: list[int], early: Early | None) -> torch.Tensor:
    if rows.is_cuda and rows.dtype is torch.bfloat16 and _want_grouped(experts):
        return run_grouped(experts, rows, torch.tensor(counts, device=rows.device))
    if torch.is_grad_enabled():
        settings = [[(p.scale, p.dropout) for p in expert] for expert in experts]
        tensors = [tensor for expert in experts for p in expert for tensor in p.tensors()]
        return _Experts.apply(rows, counts, settings, early, *tensors)
    return _run(experts, rows, counts)


def mix_directly(
    experts: Sequence[nn.Module], tokens: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Few tokens [T, H] through the experts ``chosen`` [T, K] for them, best first, mixed by ``weights`` [T, K]:
    [T, H], and the rows of each expert [E] int64. None where this takes the whole way, by ``run_experts``."""
    if len(tokens) > MAX_ROWS or torch.is_grad_enabled() or not tokens.is_cpu or torch.is_autocast_enabled("cpu"):
        return None
    modules = list(experts)
    found = {index: _plain_weights(modules[index]) for index in {e for row in chosen.tolist() for e in row}}
    if not all(found.values()) or torch_module._has_any_global_hook():
        return None
    return mix_few_tokens(found, len(modules), tokens, chosen, weights)


def _plain_weights(expert: nn.Module) -> Weights | None:
    """As ``_plain(_read(expert))``, by the shortest way: a token waits for it, with the caches full of weights."""
    if type(expert) is not SwiGLU or _hooked(expert):
        return None
    modules = expert._modules
    gate, up, down = modules["gate_proj"], modules["up_proj"], modules["down_proj"]
    gate, up, down = _plain_weight(gate), _plain_weight(up), _plain_weight(down)
    return None if gate is None or up is None or down is None else (gate, up, down)


def _plain_weight(module: nn.Module) -> torch.Tensor | None:
    if type(module) is nn.Linear and not _hooked(module):
        parameters = module._parameters
        return parameters["weight"] if parameters["bias"] is None else None
    read = _read_projection(module)
    return read.weight if read and read.a is None else None


def _plain(expert: Expert) -> Weights | None:
    return None if any(p.a is not None for p in expert) else tuple(p.weight for p in expert)


def _want_grouped(experts: list[Expert]) -> bool:
    return bool(experts) and all(p.a is None and p.weight.nbytes <= GROUPED_BYTES for e in experts for p in e)


def _cast(projection: Projection, dtype: torch.dtype) -> Projection:
    a, b = (None if t is None else t.to(dtype) for t in (projection.a, projection.b))
    return projection._replace(weight=projection.weight.to(dtype), a=a, b=b)


def _read(expert: nn.Module) -> Expert | None:
    """The projections of an expert if they are all that it does. Reads the modules' dicts: attributes are slow."""
    if type(expert) is not SwiGLU or _hooked(expert):
        return None
    found = tuple(_read_projection(expert._modules[name]) for name in ("gate_proj", "up_proj", "down_proj"))
    return found if all(found) else None


def _read_projection(module: nn.Module) -> Projection | None:
    """Of a linear layer without bias, or of one that peft has put a single ordinary LoRA adapter on."""
    if _hooked(module):
        return None
    kind = type(module)
    if kind is nn.Linear:
        parameters = module._parameters
        return Projection(parameters["weight"]) if parameters["bias"] is None else None
    if (kind.__module__, kind.__name__) != ("peft.tuners.lora.layer", "Linear"):
        return None
    base = _read_projection(module.base_layer)
    if base is None or module.disable_adapters:
        return None
    if module.merged:
        return base
    (name, *more) = module.active_adapters
    if more or name not in module.lora_A or name in module.lora_variant:
        return None
    a, b = _read_projection(module.lora_A[name]), _read_projection(module.lora_B[name])
    dropout = module.lora_dropout[name]
    if not a or not b or a.weight.dtype != base.weight.dtype or type(dropout) not in (nn.Dropout, nn.Identity):
        return None
    rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return Projection(base.weight, a.weight, b.weight, module.scaling[name], rate)


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class _Experts(torch.autograd.Function):
    """Rows sorted by expert through the experts, whose tensors come as those of gate, up, down, gate, up, ...

    The gradient of a weight is written once, where it stays; what goes into the down projection is not kept.
    """

    @staticmethod
    def forward(ctx, rows, counts: list[int], settings: list, early: Early | None, *tensors) -> torch.Tensor:
        kept: list[torch.Tensor | None] = []
        outputs = _run(_experts(tensors, settings), rows, counts, kept)
        ctx.counts, ctx.settings, ctx.early, ctx.tensors = counts, settings, early, len(tensors)
        ctx.save_for_backward(rows, *tensors, *kept)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        rows, *saved = ctx.saved_tensors
        tensors, kept = saved[: ctx.tensors], saved[ctx.tensors :]
        needed = ctx.needs_input_grad[4:]
        grad = grad.contiguous()
        of_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        experts = _experts(tensors, ctx.settings)
        parts = list(_parts(ctx.counts))

        def flow_back(index: int) -> Flow:
            part, place = parts[index]
            into = None if of_rows is None else of_rows[part]
            return _flow_back(experts[index], kept[place : place + 9], grad[part], into)

        early = ctx.early is not None and of_rows is not None
        flows = [flow_back(index) if count else None for index, count in enumerate(ctx.counts)] if early else []
        if early:
            ctx.early(of_rows)
        of_tensors: list[torch.Tensor | None] = []
        for index, (expert, count, (part, place)) in enumerate(zip(experts, ctx.counts, parts, strict=True)):
            wanted = needed[9 * index : 9 * index + 9]
            if count:
                flow = flows[index] if early else flow_back(index)
                of_tensors += _weigh(expert, rows[part], kept[place : place + 9], grad[part], flow, wanted)
                if early:
                    flows[index] = None
            else:
                own = tensors[9 * index : 9 * index + 9]
                of_tensors += [torch.zeros_like(t) if want else None for t, want in zip(own, wanted, strict=True)]
        return of_rows, None, None, None, *of_tensors


def _parts(counts: list[int]) -> Iterable[tuple[slice, int]]:
    """Of each expert: its rows, and the place of the first thing that was kept of it."""
    start = place = 0
    for count in counts:
        yield slice(start, start + count), place
        start, place = start + count, place + (9 if count else 0)


def _experts(tensors: Sequence[torch.Tensor | None], settings: list) -> list[Expert]:
    triples = zip(tensors[0::3], tensors[1::3], tensors[2::3], strict=True)
    return [tuple(Projection(*next(triples), *own) for own in of_expert) for of_expert in settings]


def _run(
    experts: Sequence[Expert], rows: torch.Tensor, counts: list[int], kept: list[torch.Tensor | None] | None = None
) -> torch.Tensor:
    """Outputs [N, H]. To ``kept`` goes, of every expert that has rows, what its backward needs: gate(x), up(x),
    silu(gate(x)), and of each projection the dropout's noise and a(x)."""
    outputs = torch.empty_like(rows)
    few_done = False
    if kept is None and all(plain := [_plain(expert) for expert in experts]):
        few_done = run_few_rows(plain, rows, counts, outputs)
    parts = zip(counts, rows.split(counts), outputs.split(counts), experts, strict=True)
    for count, x, y, (gate, up, down) in parts:
        if not count or few_done and count <= MAX_ROWS:
            continue
        turns = count in TURNED_ROWS and x.is_cpu
        turned = x.t().contiguous() if turns else None
        g, *of_gate = _project(gate, x, turned)
        u, *of_up = _project(up, x, turned)
        activated = F.silu(g)
        hidden = activated.mul_(u) if kept is None else activated * u
        if turns:
            out, *of_down = _project(down, hidden, hidden.t())
            y.copy_(out)
        else:
            _, *of_down = _project(down, hidden, None, y)
        if kept is not None:
            kept += [g, u, activated, *of_gate, *of_up, *of_down]
    return outputs


def _project(p: Projection, x: torch.Tensor, turned: torch.Tensor | None, out: torch.Tensor | None = None):
    """Output [M, out], noise and a(x); laid out by columns if x.T comes too."""
    if turned is not None:
        y = torch.mm(p.weight, turned).t()
    else:
        y = F.linear(x, p.weight) if out is None else torch.mm(x, p.weight.t(), out=out)
    if p.a is None:
        return y, None, None
    noise = None
    if p.dropout:  # drawn row by row, as the module draws it
        noise = x.new_empty(x.shape).bernoulli_(1 - p.dropout).div_(1 - p.dropout)
    low = F.linear(x if noise is None else x * noise, p.a)
    return y.addmm_(low, p.b.t(), alpha=p.scale), noise, low


class Flow(NamedTuple):
    """Gradients of one expert's gate(x) and up(x) [M, F], and of a(x) [M, R] of each projection with an adapter."""

    gate: torch.Tensor
    up: torch.Tensor
    low: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def _flow_back(expert: Expert, kept, grad, of_x: torch.Tensor | None) -> Flow:
    """What the gradients of one expert's tensors need; that of x [M, H] goes into ``of_x``."""
    gate, up, down = expert
    g, u, activated, gate_noise, _, up_noise, _, down_noise, _ = kept
    of_hidden = torch.mm(grad, down.weight)
    low_down = _flow_through(down, down_noise, grad, of_hidden)
    if of_hidden.stride() != g.stride():  # as the products were laid out
        of_hidden = torch.empty_like(g).copy_(of_hidden)
    of_u = activated * of_hidden
    of_g = torch.ops.aten.silu_backward(of_hidden.mul_(u), g)
    if of_x is not None:
        torch.mm(of_g, gate.weight, out=of_x).addmm_(of_u, up.weight)
    low = _flow_through(gate, gate_noise, of_g, of_x), _flow_through(up, up_noise, of_u, of_x), low_down
    return Flow(of_g, of_u, low)


def _flow_through(p: Projection, noise, grad, of_x: torch.Tensor | None) -> torch.Tensor | None:
    """The gradient of a(x), and what flows on through the adapter, which is added to ``of_x``."""
    if p.a is None:
        return None
    of_low = torch.mm(grad, p.b).mul_(p.scale)
    if of_x is not None:
        if noise is None:
            of_x.addmm_(of_low, p.a)
        else:
            of_x.addcmul_(torch.mm(of_low, p.a), noise)
    return of_low


def _weigh(expert: Expert, x, kept, grad, flow: Flow, wanted) -> list[torch.Tensor | None]:
    """Gradients of one expert's tensors, as far as ``wanted``."""
    gate, up, down = expert
    _, u, activated, *low_rank = kept
    hidden = activated * u if wanted[6] or down.a is not None else None
    of_gate = _weigh_projection(gate, x, low_rank[:2], flow.gate, flow.low[0], wanted[:3])
    of_up = _weigh_projection(up, x, low_rank[2:4], flow.up, flow.low[1], wanted[3:6])
    of_down = _weigh_projection(down, hidden, low_rank[4:], grad, flow.low[2], wanted[6:])
    return [*of_gate, *of_up, *of_down]


def _weigh_projection(p: Projection, x, kept, grad, of_low, wanted) -> list[torch.Tensor | None]:
    """Gradients of weight, a and b, as far as ``wanted``."""
    of_weight = weight_gradient(grad, x) if wanted[0] else None
    if p.a is None:
        return [of_weight, None, None]
    noise, low = kept
    of_a = torch.mm(of_low.t(), x if noise is None else x * noise) if wanted[1] else None
    of_b = torch.mm(low.t(), grad).t().contiguous().mul_(p.scale) if wanted[2] else None
    return [of_weight, of_a, of_b]
