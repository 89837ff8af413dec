"""What is compiled for experts against what torch does."""

import logging
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from unimoe_ray.kernels.library import library
from unimoe_ray.model import compiled, moe
from unimoe_ray.model.compiled import (
    HUGE_BYTES,
    MAX_GRADIENT_ROWS,
    MAX_ROWS,
    mix_few_tokens,
    route_few_tokens,
    run_few_rows,
    weight_gradient,
)
from unimoe_ray.model.experts import SwiGLU, run_experts
from unimoe_ray.model.moe import MoELayer
from unimoe_ray.model.routing import mixing_weights

SIZES = [(16, 32), (512, 1376), (37, 23), (3, 1)]  # those of vectors, and with rests


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def weights_of(expert: SwiGLU) -> compiled.Weights:
    return expert.gate_proj.weight, expert.up_proj.weight, expert.down_proj.weight


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def the_whole_way(monkeypatch, layer: MoELayer, x: torch.Tensor):
    with monkeypatch.context() as without:
        without.setattr(compiled, "_kernels", lambda: None)
        return layer(x)


@pytest.mark.parametrize(("hidden", "inner"), SIZES)
def test_rows_of_each_expert(hidden, inner, threads):
    """Of those that have few: the rows of others are left."""
    torch.manual_seed(0)
    counts = [3, MAX_ROWS + 1, *range(MAX_ROWS + 1), 40, 0]
    experts = [SwiGLU(hidden, inner) for _ in counts]
    rows = torch.randn(sum(counts), hidden)
    found = torch.full_like(rows, -1.0)
    assert run_few_rows(list(map(weights_of, experts)), rows, counts, found)
    for expert, part, got in zip(experts, rows.split(counts), found.split(counts), strict=True):
        if 0 < len(part) <= MAX_ROWS:
            assert relative_error(got, expert(part)) < 1e-6
        else:
            assert (got == -1).all()


@pytest.mark.parametrize("counts", [[1, 0, 5], [MAX_ROWS, MAX_ROWS + 1, 2], [40, 50, 60]])
def test_all_rows(counts):
    """Each expert goes its own way, whatever the others have: a part of the experts elsewhere has the same bits."""
    torch.manual_seed(0)
    experts, rows = nn.ModuleList(SwiGLU(64, 96) for _ in counts), torch.randn(sum(counts), 64)
    found = run_experts(experts, rows, counts)
    for expert, part, got in zip(experts, rows.split(counts), found.split(counts), strict=True):
        assert torch.equal(run_experts([expert], part, [len(part)]), got)
        assert not len(part) or relative_error(got, expert(part)) < 1e-6


@pytest.mark.parametrize(("hidden", "experts", "top_k"), [(16, 1, 1), (512, 8, 2), (37, 5, 3), (3, 7, 7), (64, 300, 2)])
def test_routing(hidden, experts, top_k):
    torch.manual_seed(0)
    gate, x = torch.randn(experts, hidden), torch.randn(MAX_ROWS, hidden)
    chosen, weights, logits = route_few_tokens(x, gate, top_k)
    assert relative_error(logits, x @ gate.t()) < 1e-6
    wanted, indices = logits.topk(top_k)
    assert torch.equal(chosen, indices) and relative_error(weights, mixing_weights(wanted)) < 1e-6
    assert top_k != 2 or torch.equal(weights.sum(-1), torch.ones(MAX_ROWS))
    for part in (slice(0, 1), slice(3, 10), slice(4, 4)):
        alone = route_few_tokens(x[part], gate, top_k)
        assert all(torch.equal(a, b[part]) for a, b in zip(alone, (chosen, weights, logits), strict=True))


def test_routing_of_what_is_no_number():
    """Goes somewhere, each expert once, and is seen in the weights."""
    gate, x = torch.eye(4), torch.zeros(5, 4)
    x[1, 2], x[2], x[3, 1], x[4, 0] = torch.nan, torch.nan, torch.inf, -torch.inf
    chosen, weights, _ = route_few_tokens(x, gate, 3)
    assert all(sorted(set(row)) == sorted(row) and min(row) >= 0 and max(row) < 4 for row in chosen.tolist())
    assert weights[0].tolist() == pytest.approx([1 / 3] * 3) and weights[1:4].isnan().any(-1).all()


def test_what_is_routed_by_torch():
    gate, x = torch.randn(4, 16), torch.randn(MAX_ROWS + 1, 16)
    assert route_few_tokens(x, gate, 2) is None and route_few_tokens(x[:2], gate, 2)
    assert route_few_tokens(x[:2].bfloat16(), gate, 2) is None and route_few_tokens(x[:2], gate.double(), 2) is None
    assert route_few_tokens(x[:2], gate[:, :8].contiguous(), 2) is None and route_few_tokens(x[:2], gate, 5) is None
    with torch.enable_grad():
        assert route_few_tokens(x[:2], gate, 2) is None


def huge_bytes() -> int:
    return 1024 * sum(map(int, re.findall(r"AnonHugePages: +(\d+) kB", Path("/proc/self/smaps").read_text())))


def first_tokens_of_a_layer() -> tuple[int, int]:
    """Bytes of its experts, and how many moved to huge pages."""
    torch.manual_seed(0)
    layer, x = MoELayer(512, 1376, 4, 2), torch.randn(MAX_ROWS, 512)
    assert layer.experts[0].up_proj.weight.nbytes >= HUGE_BYTES
    copies, before = [p.clone() for p in layer.parameters()], huge_bytes()
    with torch.inference_mode():
        found = layer(x)[0]
        moved = huge_bytes() - before
        assert all(map(torch.equal, layer.parameters(), copies)) and torch.equal(layer(x)[0], found)
    return sum(p.nbytes for p in layer.experts.parameters()), moved


def test_large_weights_move_to_huge_pages_and_stay_as_they_are():
    """In a process of its own: what others left in this one's memory may lie in huge pages already."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        size, moved = pool.submit(first_tokens_of_a_layer).result(200)
    if not moved:
        pytest.skip("this system moves no memory to huge pages (Linux 6.1 and later do)")
    assert moved >= 0.5 * size


@pytest.mark.parametrize(("hidden", "inner"), SIZES)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_layer(hidden, inner, top_k, threads, monkeypatch):
    torch.manual_seed(0)
    layer = MoELayer(hidden, inner, 5, top_k)
    for tokens in (1, 4, MAX_ROWS, MAX_ROWS + 1):
        x = torch.randn(tokens, hidden)
        found, stats = layer(x)
        wanted, whole = the_whole_way(monkeypatch, layer, x)
        assert relative_error(found, wanted) < 1e-6
        assert torch.equal(stats.tokens_per_expert, whole.tokens_per_expert)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_whole_way_has_the_same_bits(top_k, monkeypatch):
    torch.manual_seed(0)
    layer, x = MoELayer(64, 96, 4, top_k), torch.randn(MAX_ROWS, 64)
    found, _ = layer(x)
    monkeypatch.setattr(moe, "mix_directly", lambda *_: None)
    assert torch.equal(layer(x)[0], found)


@pytest.mark.parametrize(("hidden", "inner"), SIZES)
def test_a_token_has_the_same_bits_in_any_company(hidden, inner):
    torch.manual_seed(0)
    experts = dict(enumerate(weights_of(SwiGLU(hidden, inner)) for _ in range(5)))
    x, shares = torch.randn(MAX_ROWS, hidden), torch.rand(MAX_ROWS, 2)
    chosen = torch.rand(MAX_ROWS, 5).topk(2).indices
    together, _ = mix_few_tokens(experts, 5, x, chosen, shares)
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for first, last in [(0, 1), (3, 7), (5, 12), (0, 12)]:
                part = slice(first, last)
                alone, _ = mix_few_tokens(experts, 5, x[part], chosen[part], shares[part])
                assert torch.equal(alone, together[part])
    finally:
        torch.set_num_threads(before)


def test_experts_that_agree_are_mixed_to_what_they_say():
    torch.manual_seed(0)
    layer = MoELayer(64, 96, 4, 2)
    for expert in layer.experts:
        expert.load_state_dict(layer.experts[0].state_dict())
    x = torch.randn(MAX_ROWS, 64)
    assert torch.equal(layer(x)[0], run_experts(layer.experts[:1], x, [MAX_ROWS]))


def test_a_broken_token_breaks_no_other():
    torch.manual_seed(0)
    experts = dict(enumerate(weights_of(SwiGLU(32, 48)) for _ in range(2)))
    x, chosen, shares = torch.randn(4, 32), torch.tensor([[0, 1]] * 4), torch.full((4, 2), 0.5)
    wanted, _ = mix_few_tokens(experts, 2, x, chosen, shares)
    x[1, 3], x[2, 5] = torch.nan, 1e30
    found, _ = mix_few_tokens(experts, 2, x, chosen, shares)
    assert found[1].isnan().all() and torch.equal(found[[0, 3]], wanted[[0, 3]])


class Tagged(torch.Tensor):
    """A tensor whose memory may hold anything."""


def test_what_the_kernel_is_not_for():
    weights, rows = weights_of(SwiGLU(16, 24)), torch.randn(4, 16)

    def runs(weights: compiled.Weights, rows: torch.Tensor) -> bool:
        return run_few_rows([weights], rows, [len(rows)], torch.empty_like(rows))

    assert runs(weights, rows)
    assert not run_few_rows([], rows[:0], [], rows[:0])
    for unlike in (rows.double(), rows.to("meta"), rows.t().contiguous().t(), rows[:, :8], rows.as_subclass(Tagged)):
        assert not runs(weights, unlike)
    gate, up, down = weights
    for unlike in (gate.bfloat16(), gate.as_subclass(Tagged), gate.t().contiguous().t(), gate[:8], gate.to("meta")):
        assert not runs((unlike, up, down), rows)


def test_a_hook_is_called():
    layer, called = MoELayer(16, 24, 2, 2), []
    plain = layer(x := torch.randn(3, 16))[0]
    layer.experts[1].register_forward_hook(lambda module, inputs, output: called.append(len(output)))
    assert relative_error(layer(x)[0], plain) < 1e-6 and called == [3]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_follows_its_input():
    layer = MoELayer(16, 24, 2, 2)  # all experts are chosen: a trace holds choices fast
    layer.forward, whole = lambda tokens: whole(tokens)[0], layer.forward
    x = torch.randn(2, 3, 16)
    traced = torch.jit.trace(layer, x[0])
    assert relative_error(traced(x[1]), layer(x[1])) < 1e-6


def test_autocast_has_its_own_way():
    layer = MoELayer(16, 24, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 16))[0].dtype is torch.bfloat16


def test_no_compiler(monkeypatch, caplog):
    torch.manual_seed(0)
    layer, x = MoELayer(16, 24, 2, 2), torch.randn(3, 16)
    wanted = layer(x)[0]
    monkeypatch.setenv("CXX", "/nowhere/g++")
    library.cache_clear()
    compiled._kernels.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert relative_error(layer(x)[0], wanted) < 1e-6
            layer(x)
        (record,) = caplog.records
        assert "/nowhere/g++" in record.getMessage()
    finally:
        library.cache_clear()
        compiled._kernels.cache_clear()


@pytest.mark.parametrize("shape", [(96, 64), (1376, 512), (23, 37), (1, 1), (12, 16), (13, 33)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 17, 64, MAX_GRADIENT_ROWS, MAX_GRADIENT_ROWS + 1])
def test_gradients_of_weights(rows, shape, threads):
    torch.manual_seed(0)
    grad, x = (torch.randn(rows, size) for size in shape)
    exact = grad.double().t() @ x.double()
    found = weight_gradient(grad, x)
    assert found.is_contiguous() and relative_error(found, exact) < 1e-6
    by_columns = [tensor.t().contiguous().t() for tensor in (grad, x)]
    for others in (
        by_columns,
        (grad, by_columns[1]),
        (by_columns[0], x),
        [torch.cat([t, t], 1)[:, ::2] for t in (grad, x)],
    ):
        wanted = others[0].double().t() @ others[1].double()
        assert relative_error(weight_gradient(*others), wanted) < 1e-6


def test_gradients_of_other_weights():
    for dtype in (torch.float64, torch.bfloat16):
        grad, x = torch.randn(3, 24, dtype=dtype), torch.randn(3, 16, dtype=dtype)
        assert torch.equal(weight_gradient(grad, x), grad.t() @ x)
    assert weight_gradient(torch.empty(3, 24, device="meta"), torch.empty(3, 16, device="meta")).shape == (24, 16)


@pytest.mark.parametrize("hidden", [64, 37, 1])
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (5, 2), (40, 3)])
def test_gradients_of_the_weighted_sum(tokens, top_k, hidden, threads, monkeypatch):
    torch.manual_seed(0)
    order, _ = moe.sort_slots(torch.rand(tokens, 4).topk(top_k).indices, 4)
    inputs = [torch.randn(tokens * top_k, hidden), torch.rand(tokens, top_k)]
    upstream = torch.randn(tokens, hidden)

    def gradients() -> list[torch.Tensor]:
        outputs, weights = (tensor.clone().requires_grad_() for tensor in inputs)
        with torch.enable_grad():
            moe.combine(outputs, order, weights).backward(upstream)
        return [outputs.grad, weights.grad]

    found = gradients()
    monkeypatch.setattr(moe, "combine_gradients", lambda *_: None)
    wanted = gradients()
    assert torch.equal(found[0], wanted[0]) and torch.allclose(found[1], wanted[1], rtol=1e-5, atol=1e-6)


def test_gradients_go_the_whole_way():
    layer, x = MoELayer(16, 24, 2, 2), torch.randn(3, 16, requires_grad=True)
    with torch.enable_grad():
        layer(x)[0].sum().backward()
    assert x.grad is not None and all(parameter.grad is not None for parameter in layer.parameters())
