"""What a compiled kernel does for experts on CPUs, in fp32, where the library behind torch is slow: few rows without
gradients, as in a step of decoding, and some gradients. Without a compiler, or for other tensors, torch does
it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from ctypes import CDLL, POINTER, Structure, byref, c_int32, c_int64, c_void_p
from functools import lru_cache
from itertools import accumulate

import torch
from torch import nn

from unimoe_ray.kernels.library import KernelUnavailable, library

logger = logging.getLogger(__name__)
# Up to so many rows of an expert: 1.1 to 1.8 times faster than torch; with 16 as fast.
MAX_ROWS = 12
# Rows up to which the gradient of a weight is made faster: 1.1 times at 128, 2 times at 16; with 256 as fast.
MAX_GRADIENT_ROWS = 256

# Weights of so many bytes are worth huge pages, and where those lie that have been moved there.
HUGE_BYTES = 1 << 20
_moved: set[int] = set()

# gate [F, H], up [F, H], down [H, F]
Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class _Experts(Structure):
    _fields_ = [("weights", POINTER(c_void_p)), *((name, c_int64) for name in ("number", "hidden", "inner"))]


def route_few_tokens(
    tokens: torch.Tensor, gate: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Tokens [T, H], at most ``MAX_ROWS``, by a router ``gate`` [E, H]: the experts chosen [T, K] int64, best first,
    their weights [T, K] and the logits [T, E]. None where that is up to torch, or with gradients."""
    (length, hidden), number = tokens.shape, len(gate)
    if length > MAX_ROWS or torch.is_grad_enabled() or _traced() or not _is_plain(tokens) or not _is_plain(gate):
        return None
    if gate.shape != (number, hidden) or not 1 <= top_k <= number or _kernels() is None:
        return None
    chosen, weights = torch.empty(length, top_k, dtype=torch.int64), tokens.new_empty(length, top_k)
    logits = tokens.new_empty(length, number)
    sizes, results = map(c_int64, (number, hidden, top_k)), map(_address, (chosen, weights, logits))
    _kernels().route(_address(gate), *sizes, _address(tokens), c_int64(length), *results)
    return chosen, weights, logits


def run_few_rows(experts: Sequence[Weights], rows: torch.Tensor, counts: Sequence[int], outputs: torch.Tensor) -> bool:
    """Of ``rows`` [N, H], the first counts[0] of them for the first expert and so on, those of experts that have at
    most ``MAX_ROWS`` to their places in ``outputs`` [N, H].

    False where that is up to torch: on other devices, in other dtypes, when traced, without a compiler.
    """
    firsts = list(accumulate(counts, initial=0))
    few = [index for index, count in enumerate(counts) if 0 < count <= MAX_ROWS]
    found = _read({place: experts[index] for place, index in enumerate(few)}, len(few), rows)
    if found is None or not _is_plain(outputs):
        return False
    indices, length = c_int64 * len(few), sum(counts[index] for index in few)
    scratch = rows.new_empty(2 * length * found.inner)
    _kernels().run_experts(
        byref(found),
        indices(*[firsts[index] for index in few]),
        indices(*[counts[index] for index in few]),
        c_int64(length),
        *map(_address, (rows, outputs, scratch)),
        _threads(),
    )
    return True


def mix_few_tokens(
    experts: dict[int, Weights], num_experts: int, tokens: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Tokens [T, H], at most ``MAX_ROWS``, through the experts ``chosen`` [T, K] int64 for them, mixed by ``weights``
    [T, K], best first: [T, H], and the rows of each expert [E] int64. None where ``run_few_rows`` says False.

    experts: at least the chosen ones, by their number
    """
    tokens = tokens.contiguous()
    found = _read(experts, num_experts, tokens)
    if found is None:
        return None
    for expert in experts.values():
        if expert[0].data_ptr() not in _moved:
            _want_huge_pages(expert)
    chosen, weights = chosen.contiguous(), weights.to(tokens.dtype).contiguous()
    (length, top_k), mixed = chosen.shape, torch.empty_like(tokens)
    counts = chosen.new_empty(num_experts)
    scratch = tokens.new_empty(2 * length * top_k * (found.hidden + found.inner))
    _kernels().mix(
        byref(found),
        c_int64(length),
        c_int64(top_k),
        *map(_address, (chosen, weights, tokens, mixed, counts, scratch)),
        _threads(),
    )
    return mixed, counts


def weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Of a linear layer's weight: ``grad.T @ x`` for ``grad`` [M, out] of its outputs and its inputs ``x`` [M, in]."""
    length, (rows, columns) = len(x), (grad.shape[1], x.shape[1])
    kernels = _kernels() if length <= MAX_GRADIENT_ROWS and _is_fp32(grad) and _is_fp32(x) and not _traced() else None
    if kernels is None:
        return torch.mm(grad.t(), x)
    out, threads = x.new_empty(rows, columns), torch.get_num_threads()
    scratch = x.new_empty(kernels.gradient_scratch(c_int64(length), c_int64(columns), c_int32(threads)))
    strides = c_int64 * 2
    kernels.weight_gradient(
        _address(grad),
        strides(*grad.stride()),
        _address(x),
        strides(*x.stride()),
        *map(c_int64, (length, rows, columns)),
        *map(_address, (out, scratch)),
        c_int32(threads),
    )
    return out


def combine_gradients(
    grad: torch.Tensor, outputs: torch.Tensor, order: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Backward of ``moe.combine`` in one pass: the gradients of its outputs [T*K, H] and weights [T, K]; None where
    that is up to torch."""
    if _traced() or not all(map(_is_plain, (grad, outputs, weights))) or not order.is_contiguous() or not _kernels():
        return None
    of_outputs, of_weights = torch.empty_like(outputs), torch.empty_like(weights)
    sizes = map(c_int64, (len(order), weights.shape[1], grad.shape[1]))
    inputs, results = (grad, outputs, order, weights), (of_outputs, of_weights)
    _kernels().combine_gradients(*map(_address, inputs), *sizes, *map(_address, results), _threads())
    return of_outputs, of_weights


def _read(experts: dict[int, Weights], number: int, rows: torch.Tensor) -> _Experts | None:
    """As the kernel takes them; None if it can't, or there are none."""
    if _traced() or not experts or not _is_plain(rows):
        return None
    hidden, inner = rows.shape[1], len(next(iter(experts.values()))[0])
    shapes = [(inner, hidden), (inner, hidden), (hidden, inner)]
    addresses = (c_void_p * (3 * number))()
    for index, expert in experts.items():
        for place, (weight, shape) in enumerate(zip(expert, shapes, strict=True), 3 * index):
            if not _is_plain(weight) or weight.shape != shape:
                return None
            addresses[place] = weight.data_ptr()
    return _Experts(addresses, number, hidden, inner) if _kernels() else None


def _want_huge_pages(expert: Weights) -> None:
    _moved.add(expert[0].data_ptr())
    for weight in expert:
        if weight.nbytes >= HUGE_BYTES:
            _kernels().want_huge_pages(_address(weight), c_int64(weight.nbytes))


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _is_fp32(tensor: torch.Tensor) -> bool:
    """And in the memory of the CPU. Of a subclass, nobody knows what its memory holds."""
    kind = type(tensor)
    return (kind is nn.Parameter or kind is torch.Tensor) and tensor.dtype is torch.float32 and tensor.is_cpu


def _is_plain(tensor: torch.Tensor) -> bool:
    return _is_fp32(tensor) and tensor.is_contiguous()


def _address(tensor: torch.Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())


def _threads() -> c_int32:
    return c_int32(torch.get_num_threads())


@lru_cache(maxsize=1)
def _kernels() -> CDLL | None:
    try:
        kernels = library("experts")
    except KernelUnavailable as reason:
        logger.warning("experts without their compiled kernel, slower: %s", reason)
        return None
    for name in ("route", "run_experts", "mix", "weight_gradient", "combine_gradients", "want_huge_pages"):
        kernels[name].restype = None
    kernels.gradient_scratch.restype = c_int64
    return kernels
