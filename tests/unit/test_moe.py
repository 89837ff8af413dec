"""The mixture layer against a slow per-token computation, gradients included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unimoe_ray.config.model import MoEConfig
from unimoe_ray.model.language import RoutingRecorder, SparseFeedForward
from unimoe_ray.model.moe import MoELayer
from unimoe_ray.model.routing import balance_loss

HIDDEN, INNER = 5, 7


def build(experts: int, top_k: int, seed: int = 0, dtype=torch.float64, cls=MoELayer, **more) -> MoELayer:
    torch.manual_seed(seed)
    layer = cls(HIDDEN, INNER, experts, top_k, **more).to(dtype)
    torch.nn.init.normal_(layer.gate.weight)
    return layer


def slow(layer: MoELayer, x: torch.Tensor) -> tuple[torch.Tensor, list[list[int]]]:
    """Token by token, expert by expert; also the chosen experts, best first."""
    rows, chosen = [], []
    for token in x.reshape(-1, HIDDEN):
        logits = layer.gate.weight @ token
        values = logits.tolist()
        best = sorted(range(layer.num_experts), key=lambda e: -values[e])[: layer.top_k]
        total = sum(logits[e].exp() for e in best)
        row = torch.zeros_like(token)
        for e in best:
            expert = layer.experts[e]
            gate = expert.gate_proj.weight @ token
            inner = gate * torch.sigmoid(gate) * (expert.up_proj.weight @ token)
            row = row + logits[e].exp() / total * (expert.down_proj.weight @ inner)
        rows.append(row)
        chosen.append(best)
    return (torch.stack(rows) if rows else x.reshape(-1, HIDDEN)).view_as(x), chosen


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(0, 12), st.integers(0, 10**6))
def test_equals_the_slow_computation(data, experts, tokens, seed):
    top_k = data.draw(st.integers(1, experts))
    layer = build(experts, top_k, seed)
    x = torch.randn(tokens, HIDDEN, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    y, stats = layer(x)
    expected, chosen = slow(layer, x)
    assert torch.allclose(y, expected, atol=1e-12)
    weight = torch.randn_like(y)
    found = torch.autograd.grad((y * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs, allow_unused=True)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, torch.zeros_like(a) if b is None else b, atol=1e-11)

    assert stats.experts.tolist() == chosen
    counts = [sum(best.count(e) for best in chosen) for e in range(experts)]
    assert stats.tokens_per_expert.tolist() == counts and sum(counts) == tokens * top_k
    if tokens:
        probability = (x @ layer.gate.weight.T).softmax(-1).mean(0)
        assert torch.allclose(stats.mean_probability, probability)
        share = torch.tensor(counts) / (tokens * top_k)
        assert torch.allclose(stats.balance_loss, experts * (probability * share).sum())


def without_expert(layer: MoELayer, x: torch.Tensor, unwanted: int) -> torch.Tensor:
    """Inputs like x for which the router never takes one expert: its logit is far below all others."""
    with torch.no_grad():
        layer.gate.weight[:, 0] = 1.0
        layer.gate.weight[unwanted, 0] = -50.0
    return torch.cat([torch.ones_like(x[..., :1]), x[..., 1:]], -1)


@pytest.mark.parametrize("empty", [False, True])
def test_gradcheck(empty):
    layer = build(3, 2)
    x = torch.randn(4, HIDDEN, dtype=torch.float64)
    x = (without_expert(layer, x, 1) if empty else x).requires_grad_()
    assert (layer(x)[1].tokens_per_expert[1] == 0) == empty

    def run(x, *_):
        y, stats = layer(x)
        return y, stats.balance_loss

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


def test_an_expert_without_tokens_has_zero_gradients():
    layer = build(4, 2)
    x = without_expert(layer, torch.randn(6, HIDDEN, dtype=torch.float64), 2)
    layer(x)[0].sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert all(not p.grad.any() for p in layer.experts[2].parameters())
    assert all(p.grad.any() for p in layer.experts[0].parameters())


def test_no_tokens_at_all_still_gives_every_gradient():
    layer = build(3, 2)
    y, stats = layer(torch.zeros(0, HIDDEN, dtype=torch.float64))
    (y.sum() + stats.balance_loss).backward()
    assert y.shape == (0, HIDDEN)
    assert all(p.grad is not None and not p.grad.any() for p in layer.experts.parameters())
    assert not layer.gate.weight.grad.any()
    assert stats.tokens_per_expert.tolist() == [0, 0, 0] and stats.balance_loss.item() == 0


def test_balance_loss_is_one_when_balanced_and_e_when_collapsed():
    layer = build(4, 1)
    with torch.no_grad():
        layer.gate.weight.copy_(20 * torch.eye(4, HIDDEN))
    x = torch.eye(4, HIDDEN, dtype=torch.float64)
    assert layer(x)[1].balance_loss.item() == pytest.approx(1)
    assert layer(x[:1].expand(4, -1))[1].balance_loss.item() == pytest.approx(4, rel=1e-6)


def test_any_leading_shape():
    layer = build(3, 2)
    x = torch.randn(2, 4, HIDDEN, dtype=torch.float64)
    assert torch.equal(layer(x)[0].reshape(8, HIDDEN), layer(x.reshape(8, HIDDEN))[0])


def test_one_token_does_not_depend_on_the_others():
    layer = build(4, 2)
    x = torch.randn(9, HIDDEN, dtype=torch.float64)
    together = layer(x)[0]
    alone = torch.cat([layer(row[None])[0] for row in x])
    assert torch.allclose(together, alone, atol=1e-14)
    assert torch.equal(layer(x)[0], together)


def test_routing_is_in_fp32_under_bf16_autocast():
    layer = build(4, 2, dtype=torch.float32)
    x = torch.randn(32, HIDDEN)
    with torch.autocast("cpu", torch.bfloat16):
        _, stats = layer(x)
    wanted = layer(x)[1]
    assert torch.equal(stats.experts, wanted.experts)
    assert torch.equal(stats.mean_probability, wanted.mean_probability)


def test_names_and_sizes_in_the_state_dict():
    state = build(2, 1).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "gate.weight": (2, HIDDEN),
        **{f"experts.{e}.{p}_proj.weight": (INNER, HIDDEN) for e in range(2) for p in ("gate", "up")},
        **{f"experts.{e}.down_proj.weight": (HIDDEN, INNER) for e in range(2)},
    }


@pytest.mark.parametrize("top_k", [0, 4])
def test_impossible_top_k(top_k):
    with pytest.raises(ValueError, match=rf"top_k is {top_k}; allowed: 1 to num_experts \(3\)"):
        MoELayer(HIDDEN, INNER, 3, top_k)


def test_padding_passes_by_as_zeros_and_is_not_counted():
    recorder = RoutingRecorder()
    layer = build(3, 2, cls=SparseFeedForward, recorder=recorder)
    x = torch.randn(2, 4, HIDDEN, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1], dtype=torch.bool)
    recorder.start(mask)
    y = layer(x)
    recorder.start(None)
    whole = layer(x)
    assert torch.allclose(y.reshape(8, -1)[mask], whole.reshape(8, -1)[mask], atol=1e-14)
    assert not y.reshape(8, -1)[~mask].any()
    recorder.start(mask)
    y = layer(x)
    assert len(recorder.layers) == 1 and int(recorder.layers[0].tokens_per_expert.sum()) == 5 * 2
    y.sum().backward()
    assert not x.grad.reshape(8, -1)[~mask].any() and x.grad.reshape(8, -1)[mask].all(-1).all()


def test_balance_over_layers():
    recorder = RoutingRecorder()
    settings = MoEConfig(balance_coef=0.5, z_loss_coef=0.25)
    assert recorder.loss(settings) == 0.0
    layers = [build(3, 2, seed, cls=SparseFeedForward, recorder=recorder) for seed in range(2)]
    recorder.start(None)
    for layer in layers:
        layer(torch.randn(6, HIDDEN, dtype=torch.float64))
    each = [stats.balance_loss.item() for stats in recorder.layers]
    assert each[0] != each[1]
    z = sum(stats.routing.logits.logsumexp(-1).square().mean().item() for stats in recorder.layers) / 2
    assert recorder.loss(settings).item() == pytest.approx(0.5 * sum(each) / 2 + 0.25 * z)
    summed = settings.model_copy(update={"balance_over_layers": "sum"})
    assert recorder.loss(summed).item() == pytest.approx(0.5 * sum(each) + 0.25 * z)


def test_balance_variants_against_a_slow_computation():
    layer = build(4, 2)
    kinds = torch.tensor([0, 1, 1, 0, 3, 1, 0])
    stats = layer(torch.randn(7, HIDDEN, dtype=torch.float64), kinds, 5)[1]
    sums, logits = stats.sums, stats.routing.logits

    def slow(rows: list[int], choices: int) -> float:
        mean = sum(logits[row].softmax(-1) for row in rows) / len(rows)
        share = [sum(stats.experts[row, :choices].tolist().count(e) for row in rows) / len(rows) for e in range(4)]
        return 4 * sum(mean[e].item() * share[e] / choices for e in range(4))

    groups = [[row for row in range(7) if kinds[row] == kind] for kind in (0, 1, 3)]
    for share, choices in (("all", 2), ("first", 1)):
        assert balance_loss(sums, share).item() == pytest.approx(slow(list(range(7)), choices))
        wanted = sum(len(rows) / 7 * slow(rows, choices) for rows in groups)
        assert balance_loss(sums, share, "modality").item() == pytest.approx(wanted)
    assert sums.tokens.tolist() == [3, 3, 0, 1, 0] and sums.routed.sum(-1).tolist() == [6, 6, 0, 2, 0]
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    assert torch.allclose(sums.entropy[0], entropy[kinds == 0].sum())


def test_sums_of_parts_add_up():
    layer = build(3, 2)
    x, kinds = torch.randn(9, HIDDEN, dtype=torch.float64), torch.arange(9) % 2
    whole = layer(x, kinds, 2)[1].sums
    added = layer(x[:4], kinds[:4], 2)[1].sums + layer(x[4:], kinds[4:], 2)[1].sums
    for a, b in zip(added.tensors(), whole.tensors(), strict=True):
        assert torch.allclose(a, b)
