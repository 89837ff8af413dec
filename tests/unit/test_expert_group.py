"""A model whose experts others hold answers as the whole model does, to the bit, wherever they lie."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.unit.test_engine import TOKENIZER, config, make_model, make_request, run, tokens_of
from unimoe_ray.config.placement import PlacementConfig
from unimoe_ray.config.serve_options import deployment_options
from unimoe_ray.config.serving import LanguageConfig
from unimoe_ray.errors import UsageError
from unimoe_ray.inference.engine import Engine
from unimoe_ray.inference.expert_group import ExpertGroup, ExpertShard
from unimoe_ray.inference.forward import TorchDecoder
from unimoe_ray.model.unimoe import UniMoE
from unimoe_ray.parallel.topology import Placement

# So slow that every token counts, while moving an expert costs nothing.
SLOW = PlacementConfig(tflops=1e-9, min_gain=0.01)


class InProcess:
    """A member that works when its result is asked for. asked: experts and rows of each call."""

    def __init__(self, weights: Path, dtype: torch.dtype = torch.float32):
        self.shard, self.asked = ExpertShard(weights, [0, 1], dtype), []

    def hold(self, held):
        self.held = held
        return lambda: self.shard.hold(held)

    def run(self, mixture, rows, counts):
        assert rows.dtype == np.float32 and len(rows) == sum(counts) > 0
        assert len(counts) == len(self.held[mixture])
        self.asked.append((mixture, len(rows)))
        return lambda: self.shard.run(mixture, rows, counts)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("experts") / "model.safetensors"
    state = make_model().state_dict()
    save_file({name: value.clone() for name, value in state.items() if "experts" in name}, path)
    return path


def grouped(weights: Path, size: int, settings=SLOW, interval: int = 0, dtype=torch.float32):
    model = make_model().to(dtype)
    members = [InProcess(weights, dtype) for _ in range(size)]
    return model, ExpertGroup(model, members, settings, interval)


def whole_engine(model: UniMoE, **changes) -> Engine:
    """Without the compiled kernel, which a group can't use."""
    engine = Engine(model, TOKENIZER, config(**changes))
    engine.decoder = TorchDecoder(model, engine.arena)
    return engine


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_answers_are_those_of_one_process_to_the_bit(weights, size, dtype):
    model, group = grouped(weights, size, dtype=dtype)
    assert sum(p.numel() for name, p in model.named_parameters() if "experts" in name) == 0
    rng = random.Random(size)
    requests = [
        make_request(i, rng, logprobs=2, **({"temperature": 1.0, "seed": i} if i % 2 else {})) for i in range(6)
    ]
    joins = [0, 0, 2, 3, 9, 9]
    expected = run(whole_engine(make_model().to(dtype)), requests, joins)
    engine = Engine(model, TOKENIZER, config())
    assert isinstance(engine.decoder, TorchDecoder)
    found = run(engine, requests, joins)
    for name, outputs in expected.items():
        assert tokens_of(found[name]) == tokens_of(outputs)
        assert [o.logprobs for o in found[name]] == [o.logprobs for o in outputs]
        assert (found[name][-1].expert_load == outputs[-1].expert_load).all()
    assert {mixture for member in group.members for mixture, _ in member.asked} == {0, 1}
    assert all(member.asked for member in group.members)


def test_each_expert_is_at_one_member_to_begin_with(weights):
    _, group = grouped(weights, 3)
    for mixture in range(2):
        held = [list(member.shard._experts[mixture]) for member in group.members]
        assert held == [[0, 1], [2], [3]]


def test_experts_move_when_the_load_has_drifted_and_answers_stay(weights):
    """Experts 0 and 1 of one member get nearly all tokens: they part, and only then something moves."""
    whole, (model, group) = make_model(), grouped(weights, 2, interval=5)
    even, before = [np.full((2, 4), 100), group.placement]
    group._routed[:], group._steps = even, 5
    group.begin_step()
    assert (group.placement, group.moves) == (before, 0)  # no gain
    assert not group._routed.any()
    group._routed[:], group._steps = [[100, 100, 1, 1], [5, 5, 5, 5]], 5
    group.begin_step()
    assert group.moves == 1
    first, second = group.placement.layers
    assert not any({0, 1} <= set(held) for held in first) and second == before.layers[1]
    for member, held in zip(group.members, zip(*group.placement.layers, strict=True), strict=True):
        assert [list(experts) for experts in member.shard._experts] == [list(ids) for ids in held]
    requests = [make_request(i, random.Random(i)) for i in range(4)]
    expected = run(whole_engine(whole), requests)
    found = run(Engine(model, TOKENIZER, config()), requests)
    assert {n: tokens_of(o) for n, o in found.items()} == {n: tokens_of(o) for n, o in expected.items()}


def test_served_traffic_is_what_the_plan_is_made_from(weights):
    model, group = grouped(weights, 2, PlacementConfig(tflops=1e-9, min_gain=0), interval=3)
    engine = Engine(model, TOKENIZER, config(max_step_tokens=64))
    seen = []
    replan = group._replan
    group._replan = lambda: (seen.append((group._steps, group._routed.copy())), replan())
    run(engine, [make_request(0, random.Random(0))])
    assert [steps for steps, _ in seen] == [3] * ((engine.stats()["steps"] - 1) // 3)
    total = sum(routed for _, routed in seen) + group._routed
    assert (total == engine.expert_load.sum(axis=0)).all()


def test_the_planner_may_give_a_member_no_expert_of_a_layer(weights):
    model, group = grouped(weights, 2, PlacementConfig(slots=4))
    group._place(Placement.of([[[0, 1, 2, 3], []], [[2], [0, 1, 3]]]))
    requests = [make_request(i, random.Random(i)) for i in range(3)]
    expected = run(whole_engine(make_model()), requests)
    found = run(Engine(model, TOKENIZER, config()), requests)
    assert {n: tokens_of(o) for n, o in found.items()} == {n: tokens_of(o) for n, o in expected.items()}


def test_hot_experts_get_a_second_place_and_its_share_of_the_rows(weights):
    """Nine of ten tokens go to expert 0: both members hold it, and each has half of the rows."""
    model, group = grouped(weights, 2, interval=5)
    group._routed[:], group._steps = [[270, 10, 10, 10], [75, 75, 75, 75]], 5
    group.begin_step()
    assert group.moves == 1
    first = group.placement.layers[0]
    assert all(0 in held for held in first) and sorted({*first[0], *first[1]}) == [0, 1, 2, 3]
    for member, held in zip(group.members, zip(*group.placement.layers, strict=True), strict=True):
        assert [list(experts) for experts in member.shard._experts] == [list(ids) for ids in held]

    routed = [270, 20, 20, 20]  # of this step, whatever the plan was made from
    chosen = torch.arange(4).repeat_interleave(torch.tensor(routed))[torch.randperm(330), None]
    at_place = torch.bincount(group.places(0, chosen).flatten(), minlength=sum(map(len, first)))
    of_expert = torch.tensor([expert for held in first for expert in held])
    assert torch.bincount(of_expert, weights=at_place).tolist() == routed
    assert sum(at_place[: len(first[0])]) == 165

    requests = [make_request(i, random.Random(i)) for i in range(6)]
    expected = run(whole_engine(make_model()), requests, [0, 0, 2, 3, 9, 9])
    found = run(Engine(model, TOKENIZER, config()), requests, [0, 0, 2, 3, 9, 9])
    assert {n: tokens_of(o) for n, o in found.items()} == {n: tokens_of(o) for n, o in expected.items()}
    for name, outputs in expected.items():
        assert (found[name][-1].expert_load == outputs[-1].expert_load).all()


@pytest.mark.parametrize(
    ("sparse", "size", "settings", "reason"),
    [
        (True, 5, SLOW, "size is 5; the model has 4 experts in a layer"),
        (False, 2, SLOW, "size is 2; the model has 0 experts in a layer"),
        (True, 2, PlacementConfig(slots=1), "rank 0 holds 2 experts, but has 1 slots"),
    ],
)
def test_a_group_that_does_not_fit_the_model(weights, sparse, size, settings, reason):
    with pytest.raises(UsageError, match=reason):
        ExpertGroup(make_model(sparse), [InProcess(weights) for _ in range(size)], settings, 0)


def test_the_deployment_reserves_a_group_at_once():
    group = LanguageConfig(num_cpus=2, expert_parallel={"size": 2, "num_cpus": 1, "num_gpus": 1})
    options = deployment_options("language", group)
    members = [{"CPU": 1, "GPU": 1}] * 2
    assert options["placement_group_bundles"] == [{"CPU": 2, "GPU": 0}, *members]
    assert (group.replica_cpus, group.replica_gpus) == (4, 2)
    assert "placement_group_bundles" not in deployment_options("language", LanguageConfig())
