"""How many workers share a mixture's experts, and the optimizer's groups of what a worker holds."""

from __future__ import annotations

import pytest
from torch import nn

from unimoe_ray.config import load
from unimoe_ray.errors import UsageError
from unimoe_ray.parallel.groups import expert_parallel_size, split_groups, tag_expert, untag_expert
from unimoe_ray.parallel.relocate import Move, moved_experts


@pytest.mark.parametrize(
    ("wanted", "world", "experts", "expected"),
    [(1, 3, 4, 1), (2, 4, 4, 2), ("auto", 1, 4, 1), ("auto", 2, 4, 2), ("auto", 3, 4, 3), ("auto", 8, 4, 4)]
    + [("auto", 6, 4, 3), ("auto", 5, 4, 1), ("auto", 64, 256, 64)],
)
def test_ranks_that_share_experts(wanted, world, experts, expected):
    assert expert_parallel_size(wanted, world, experts) == expected


@pytest.mark.parametrize(("wanted", "world", "allowed"), [(2, 3, "1, 3"), (8, 8, "1, 2, 4"), (3, 4, "1, 2, 4")])
def test_other_numbers_are_refused_with_those_that_fit(wanted, world, allowed):
    message = f"ep_size is {wanted}; with {world} workers and 4 experts allowed: auto, {allowed}$"
    with pytest.raises(UsageError, match=message):
        expert_parallel_size(wanted, world, 4)


def test_the_setting():
    assert load("mini", ["training.expert_parallel.ep_size=auto"]).training.expert_parallel.ep_size == "auto"
    with pytest.raises(UsageError, match="training.expert_parallel.ep_size is 0: allowed: 'auto' or a number from 1"):
        load("mini", ["training.expert_parallel.ep_size=0"])


def test_groups_have_what_this_rank_holds_and_experts_come_last():
    layer = nn.ModuleDict({"gate": nn.Linear(2, 3), "experts": nn.ModuleDict({"1": nn.Linear(2, 2)})})
    elsewhere = nn.Linear(2, 2)
    for expert in (layer["experts"]["1"], elsewhere):
        tag_expert(expert, "ep_size_2")
    gate, held = list(layer["gate"].parameters()), list(layer["experts"].parameters())
    given = [
        {"params": [*gate, *held, *elsewhere.parameters()], "lr": 0.1, "name": "all"},
        {"params": [nn.Parameter(gate[0].clone())], "lr": 0.2, "name": "of another model"},
    ]
    shared, nothing, experts = split_groups(given, layer)
    assert shared == {"params": gate, "lr": 0.1, "name": "all"} and nothing["params"] == []
    assert experts == {"params": held, "lr": 0.1, "name": "ep_size_2", "moe": True}
    for expert in (layer["experts"]["1"], elsewhere):
        untag_expert(expert)
    assert split_groups(given[:1], layer) == [{"params": [*gate, *held], "lr": 0.1, "name": "all"}]


def test_moves_between_placements():
    before = [((0, 1), (2, 3)), ((0,), (1, 2, 3))]
    after = [((3, 1), (2, 0)), ((0, 2), (3, 1))]
    assert moved_experts(before, after) == [Move(0, 0, 0, 1), Move(0, 3, 1, 0), Move(1, 2, 1, 0)]
    assert moved_experts(before, before) == []
