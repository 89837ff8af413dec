"""The watch on streams of metrics lines that the statistics of real routings make: each signature, once, in words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator

import pytest
import torch

from unimoe_ray.config.training import WatchConfig
from unimoe_ray.model.routing import Routing, RoutingSums, routing_sums
from unimoe_ray.training.routing import idle_experts, routing_metrics
from unimoe_ray.training.watch import SIGNATURES, Finding, Watch

E, L, T, G = 4, 3, 400, 5
SLOTS = ["base", "image", "speech", "audio"]
NEVER = -1e4


def sums_of(logits: torch.Tensor, kinds: torch.Tensor, top_k: int) -> RoutingSums:
    """Statistics of the choices that these logits [L, T, E] lead to."""
    layers = []
    for layer in logits:
        top, experts = layer.topk(top_k, dim=-1)
        layers.append(routing_sums(Routing(experts, top.softmax(-1), layer), kinds, G))
    return RoutingSums.stack(layers)


def stream(steps: int, bias: Callable[[int], torch.Tensor], top_k: int = 2, **fields) -> Iterator[dict]:
    """Lines of a run whose routers have logits of unit noise around ``bias(step)`` [L, E], for ``steps`` steps.

    fields: functions of the step, for what the line has besides
    """
    generator = torch.Generator().manual_seed(0)
    idle: list[list[int]] = []
    for step in range(1, steps + 1):
        logits = torch.randn(L, T, E, generator=generator) + bias(step).unsqueeze(1)
        kinds = torch.randint(0, G, (T,), generator=generator)
        line = {"step": step, "run": "tune", "loss": 2 * math.exp(-step / 100) + 0.1 * float(torch.rand(()))}
        line |= routing_metrics(sums_of(logits, kinds, top_k))
        idle = idle_experts(line, idle)
        line |= {"dead_experts": idle} | {name: function(step) for name, function in fields.items()}
        yield json.loads(json.dumps(line))


def watched(lines: Iterator[dict], top_k: int = 2, **settings) -> list[Finding]:
    watch = Watch(WatchConfig(**settings), SLOTS, top_k)
    return [finding for line in lines for finding in watch.step(line)]


def at(layer: int, expert: int, value: float) -> torch.Tensor:
    bias = torch.zeros(L, E)
    bias[layer, expert] = value
    return bias


def test_statistics_of_the_line_are_those_of_a_slow_count():
    bias = (at(1, 2, 1.5) + at(2, 0, NEVER)).unsqueeze(1)
    logits = torch.randn(L, T, E, generator=torch.Generator().manual_seed(1)) + bias
    kinds = torch.arange(T) % 3
    line = routing_metrics(sums_of(logits, kinds, 2))
    for layer in range(L):
        chosen = [sorted(range(E), key=lambda e: -logits[layer, t, e])[:2] for t in range(T)]
        counts = [sum(e in pair for pair in chosen) for e in range(E)]
        firsts = [sum(pair[0] == e for pair in chosen) for e in range(E)]
        mean = sum(counts) / E
        cv = math.sqrt(sum((c - mean) ** 2 for c in counts) / E) / mean
        assert line["load_cv"][layer] == pytest.approx(cv, abs=1e-4)
        assert line["busiest_expert"][layer] == firsts.index(max(firsts))
        assert line["busiest_share"][layer] == pytest.approx(max(firsts) / T, abs=1e-4)
    assert idle_experts(line, []) == [[2, 0, 1]]
    assert idle_experts(line, [[2, 0, 6], [1, 1, 9]]) == [[2, 0, 7]]


def test_no_tokens_at_all_make_no_nan():
    line = routing_metrics(sums_of(torch.zeros(L, 0, E), torch.zeros(0, dtype=torch.int64), 2))
    assert line["load_cv"] == line["busiest_share"] == [0.0] * L and idle_experts(line, []) == []


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_healthy_run_is_silent(top_k):
    """Specialised experts, noisy loads and a falling loss with single spikes are nothing to remark on."""
    torch.manual_seed(0)
    bias = 0.5 * torch.randn(L, E)

    def loss(step: int) -> float:
        return (9.0 if step % 37 == 0 else 1.0) * 2 * math.exp(-step / 60)

    def validation(step: int) -> dict[str, float]:
        noise = torch.rand(3, generator=torch.Generator().manual_seed(step)).tolist()
        return {g: 2 * math.exp(-step / 60) * (1 + 0.1 * n) for g, n in zip("abc", noise, strict=True)}

    assert watched(stream(300, lambda _: bias, top_k, loss=loss, validation=validation), top_k) == []


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_collapse_is_said_once_and_its_end_too(top_k):
    lines = stream(220, lambda step: at(2, 1, 6.0 if 40 <= step < 120 else 0.0), top_k)
    begun, ended = (f for f in watched(lines, top_k, dead_steps=1000) if f.signature in ("collapse", "imbalance"))
    assert (begun.signature, begun.layer, begun.experts, begun.since, begun.step) == ("collapse", 2, (1,), 40, 59)
    first = "first " if top_k == 2 else ""
    assert begun.text.startswith(f"layer 3 sends 100 % of its tokens {first}to expert 1 (image) since step 40; a bala")
    assert ended.over and (ended.since, ended.step) == (120, 139) and ended.text.startswith("layer 3 no longer sends")


def test_a_collapse_that_wavers_around_its_threshold_is_said_once():
    """Hysteresis: 85 to 95 % of the tokens, back and forth, for 400 steps."""
    lines = stream(400, lambda step: at(0, 3, 3.2 if step % 60 < 30 else 2.5), 1)
    shares = [line["busiest_share"][0] for line in lines]
    assert min(shares) < 0.9 < max(shares) and min(shares) > 0.81
    lines = stream(400, lambda step: at(0, 3, 3.2 if step % 60 < 30 else 2.5), 1)
    assert [f.signature for f in watched(lines, 1)] == ["collapse"]


def test_dead_experts_of_a_layer_are_said_together_with_the_step_since_when():
    def bias(step: int) -> torch.Tensor:
        if step >= 130:
            return torch.zeros(L, E)
        return at(0, 0, NEVER if step >= 11 else 0.0) + at(0, 3, NEVER if step >= 11 else 0.0)

    both, again = [f for f in watched(stream(200, bias), imbalance=1.0) if f.signature == "dead"]
    assert (both.layer, both.experts, both.since, both.step) == (0, (0, 3), 11, 60)
    assert both.text.startswith("expert 0 (base) and expert 3 (audio) of layer 1 had no token since step 11; ")
    assert again.over and (again.since, again.step) == (130, 149)
    assert again.text == "expert 0 (base) and expert 3 (audio) of layer 1 get tokens again"


def test_an_expert_that_gets_a_token_now_and_then_is_not_dead():
    lines = stream(200, lambda step: at(1, 2, 0.0 if step % 40 == 0 else NEVER))
    assert not [f for f in watched(lines) if f.signature == "dead"]


def test_many_dead_experts_are_named_in_part():
    line = {"step": 7, "run": "r", "loss": 1.0, "expert_load": [[0.0]], "busiest_share": [], "busiest_expert": []}
    line |= {"load_cv": [], "dead_experts": [[0, e, 50] for e in range(200)]}
    (finding,) = Watch(WatchConfig(), ["base"] * 256, 8).step(line)
    assert "and 194 more of layer 1 had no token" in finding.text and len(finding.experts) == 200


@pytest.mark.parametrize("top_k", [1, 2])
def test_loads_of_high_variance_are_said_apart_from_a_collapse(top_k):
    """Two experts take turns as first choice and leave next to nothing to the others."""
    bias = at(1, 0, 4.0) + at(1, 2, 4.0)
    findings = watched(stream(100, lambda step: bias if step >= 30 else torch.zeros(L, E), top_k), top_k, imbalance=0.5)
    (finding,) = [f for f in findings if f.signature != "dead"]
    assert (finding.signature, finding.layer, finding.since, finding.step) == ("imbalance", 1, 30, 49)
    assert finding.text.startswith("layer 2 has uneven loads since step 30: ")
    assert "expert 0 (base)" in finding.text or "expert 2 (speech)" in finding.text


def test_where_every_expert_takes_every_token_nothing_is_uneven():
    assert watched(stream(60, lambda _: at(0, 0, 2.0), 4), 4, collapse_share=1.0) == []


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_said_at_once(loss):
    line = {"run": "base", "expert_load": None}
    lines = [line | {"step": n, "loss": loss if n >= 5 else 3.0} for n in range(1, 60)]
    (finding,) = watched(iter(lines))
    assert (finding.signature, finding.step) == ("divergence", 5)
    assert finding.text.startswith(f"the loss is {loss} since step 5; a lower learning rate")


def test_a_loss_that_climbs_far_above_its_lowest_has_diverged():
    def loss(step: int) -> float:
        return 4 * math.exp(-step / 30) + 0.05 if step < 100 else min(0.2 + 0.1 * (step - 100), 6.0)

    line = {"run": "base", "expert_load": None}
    (finding,) = watched(line | {"step": n, "loss": loss(n)} for n in range(1, 200))
    assert finding.signature == "divergence" and 100 <= finding.since < finding.step < 120
    assert "times its lowest" in finding.text


def test_a_small_loss_may_waver():
    """A run that ends at a thousandth of its first loss may double and triple there."""
    line = {"run": "base", "expert_load": None}
    losses = [4.0 * math.exp(-n / 20) + (0.002 if n % 100 < 50 else 0.012) for n in range(400)]
    assert watched(line | {"step": n, "loss": loss} for n, loss in enumerate(losses, 1)) == []


def curves(step: int, **rising: float) -> dict[str, float]:
    falling = {group: 0.3 + 2 * math.exp(-step / 100) for group in ("image", "speech", "audio")}
    return falling | {group: 0.9 + rate * step for group, rate in rising.items()}


def validated(losses: Callable[[int], dict[str, float]]) -> list[Finding]:
    line = {"run": "tune", "expert_load": None, "loss": 1.0}
    return watched(line | {"step": n, "validation": losses(n)} for n in range(25, 400, 25))


def test_one_modality_that_gets_worse_while_the_others_improve():
    (finding,) = validated(lambda step: curves(step, audio=0.004 if step > 100 else -0.002))
    assert (finding.signature, finding.group) == ("validation", "audio")
    assert finding.text.startswith("the validation loss of audio rises while the others fall: 0.7 at step 100, ")


def test_validation_losses_that_all_rise_or_one_that_recovers_are_not_that_signature():
    assert validated(lambda step: curves(step, image=0.01, speech=0.01, audio=0.01)) == []
    once = validated(lambda step: curves(step) | ({"audio": 2.0} if step == 200 else {}))
    assert once == []
    assert validated(lambda step: {"text": 0.001 + (step % 50) * 0.0002, "image": math.exp(-step / 100)}) == []


def test_findings_become_lines_without_what_they_have_not():
    finding = Finding("tune", 9, "collapse", 3, "words", layer=0, experts=(0,))
    line = {"run": "tune", "step": 9, "signature": "collapse", "since": 3, "text": "words", "over": False}
    assert finding.line() == line | {"layer": 0, "experts": (0,)} and finding.signature in SIGNATURES
    assert Finding("tune", 9, "divergence", 3, "words").line() == line | {"signature": "divergence"}


def test_the_earlier_lines_of_a_run_bring_a_new_watch_to_the_same_state():
    lines = list(stream(120, lambda step: at(2, 1, 6.0 if step >= 40 else 0.0), 1))
    whole, resumed = Watch(WatchConfig(), SLOTS, 1), Watch(WatchConfig(), SLOTS, 1)
    found = [whole.step(line) for line in lines]
    assert sum(map(len, found)) >= 2
    for line in lines[:50]:
        resumed.step(line)
    assert [resumed.step(line) for line in lines[50:]] == found[50:]
