"""Worlds of DeepSpeed workers that stop and go on as other worlds, against one process that never stops."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.test_expert_parallel import CROSSED, EVEN, MIRRORED, THREE, UNEVEN, reference
from tests.distributed.worlds import OPTIMIZER, SAMPLES, TRAIN, Model, build, micro_batch, run_world, samples
from unimoe_ray.checkpoint import restore
from unimoe_ray.checkpoint.saver import Saver
from unimoe_ray.checkpoint.storage import Folder
from unimoe_ray.config.checkpoint import CheckpointConfig
from unimoe_ray.config.training import TrainingConfig
from unimoe_ray.parallel.groups import Held
from unimoe_ray.training.engine import backward_step, initialize, learning_rate_factor, set_learning_rates

DECIDES = {"seed": 0, "stages.tune.tune.batch_size": SAMPLES}


@dataclass(frozen=True)
class Leg:
    """From the last state on to ``stop``, by ``world`` ranks. placement: of both mixtures, None: experts on every rank;
    zero: stage; saved: how its last state is made: at once, or in the background."""

    world: int
    stop: int
    placement: tuple[Held, Held] | None = None
    zero: int = 2
    saved: str = "now"


def ride(rank: int, world: int, settings: Model, leg: Leg, start: int, out: Path) -> None:
    from unimoe_ray.parallel.expert_parallel import distribute
    from unimoe_ray.parallel.state import read, updates_done

    config = TrainingConfig(zero_stage=leg.zero, optimizer=OPTIMIZER, precision="fp32")
    model, groups = build(settings)
    if leg.placement is not None:
        distribute(model, leg.placement)
    engine = initialize(model, groups, config, TRAIN[settings.trains].weight_decay, torch.device("cpu"))
    folder = Folder(str(out / "states"))
    state, passed_over = restore.find(folder, DECIDES)
    assert not passed_over and (0 if state is None else state.step) == start
    if state is not None:
        restore.load(engine, state)
    saver = Saver(folder, CheckpointConfig(every=1), label="tune", steps=settings.steps, decides=DECIDES, start=state)
    assert updates_done(engine) == start
    each, losses = SAMPLES // world, []
    for step in range(start, leg.stop):
        batch = micro_batch(step, range(rank * each, rank * each + each))
        answers = sum(int((sample.labels[:, 1:] >= 0).sum()) for sample in samples(step))
        set_learning_rates(engine, learning_rate_factor(step, settings.steps, config.optimizer))
        total, _ = backward_step(engine, [batch], answers)
        engine.step()
        dist.all_reduce(total)
        losses.append(total.item() / answers)
        if saver.is_due(step + 1):
            saver.save(engine, step + 1, placement=leg.placement)
    if leg.stop < settings.steps and leg.saved == "now":
        saver.save_now(engine, leg.stop, placement=leg.placement)
    elif leg.stop < settings.steps:  # the others' parts are there in any case, rank 0 commits them
        assert rank or saver._result().error is None
    torch.save({"losses": losses, "state": read(engine)}, out / f"{leg.stop}-{rank}.pt")


def check(settings: Model, legs: list[Leg], out: Path) -> None:
    expected, start, losses = reference(settings), 0, []
    for leg in legs:
        run_world(leg.world, partial(ride, settings=settings, leg=leg, start=start, out=out))
        ranks = [torch.load(out / f"{leg.stop}-{rank}.pt", weights_only=True) for rank in range(leg.world)]
        losses += ranks[0]["losses"]
        start = leg.stop
    assert losses == pytest.approx(expected["losses"], abs=1e-5)
    found = {name: state for rank in ranks for name, state in rank["state"].items()}
    assert found.keys() == expected["state"].keys()
    for name, (weight, *moments) in found.items():
        assert (weight - expected["state"][name][0]).abs().max() <= 1e-4, name
        for own, wanted in zip(moments, expected["state"][name][1:], strict=True):
            assert (own - wanted).abs().max() <= 1e-4 * wanted.abs().max().clamp(min=1e-6), name


LONG, LONG_LORA = Model(steps=7), Model("lora", steps=7)


@pytest.mark.timeout(300)
def test_a_run_goes_on_at_other_worlds_and_placements_as_if_nothing_had_happened(tmp_path):
    """Two ranks that share experts unevenly, one rank, two ranks that share them otherwise."""
    legs = [Leg(2, 2, (UNEVEN, MIRRORED)), Leg(1, 4, saved="behind"), Leg(2, 7, (CROSSED, EVEN), zero=1)]
    check(LONG_LORA, legs, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("trains", ["full", "lora", "experts", "frozen experts"])
def test_every_kind_of_training_goes_on(trains, tmp_path):
    four = (UNEVEN, EVEN)  # two groups of two ranks
    legs = [
        Leg(4, 2, four),
        Leg(2, 3, None, saved="behind"),
        Leg(3, 4, (THREE, THREE[::-1]), zero=1),
        Leg(2, 5, (EVEN, EVEN)),
        Leg(4, 6, (CROSSED, MIRRORED), saved="behind"),
        Leg(1, 7),
    ]
    check(Model(trains, steps=7), legs, tmp_path)
