"""Validation between the steps of real DeepSpeed workers: its figures, and that training does not notice it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.distributed.worlds import run_world
from tests.tiny import TinyRun
from unimoe_ray.data import prepare
from unimoe_ray.data.batch import collate
from unimoe_ray.data.loader import Layout, Step, planned_micro_batches, read_features
from unimoe_ray.data.plan import Order
from unimoe_ray.data.samples import SampleTable
from unimoe_ray.errors import UsageError
from unimoe_ray.model.unimoe import to_batch
from unimoe_ray.training.engine import initialize
from unimoe_ray.training.guard import Guard
from unimoe_ray.training.loop import train_step
from unimoe_ray.training.stages import make_trainable, start_model
from unimoe_ray.training.validation import plan_validation, validate

SEED, STEPS, PER_GROUP, MAX_TOKENS = 3, 6, 5, 48


def _plan(run: TinyRun, rank: int, world: int):
    return plan_validation(
        prepare.source(run.config, prepare.VALIDATION),
        list(run.config.stages.tune["tune"].tasks),
        samples=PER_GROUP,
        seed=SEED,
        rank=rank,
        world=world,
        max_tokens=MAX_TOKENS,
    )


def _train(run: TinyRun, rank: int, world: int, every: int) -> list[dict]:
    """Metrics of each step, with a validation after every ``every``-th one and before the first; 0: none."""
    config, settings = run.config, run.config.stages.tune["tune"]
    source = prepare.source(config, "train")
    table = SampleTable(Path(source.samples))
    torch.manual_seed(SEED)
    model = start_model(config, run.info, "tune")
    model.train()
    engine = initialize(model, make_trainable(model, settings), config.training, 0.0, torch.device("cpu"))
    order = Order(tuple(settings.tasks.items()), settings.batch_size, SEED, STEPS)
    plan = planned_micro_batches(source, order, Layout(rank, world, MAX_TOKENS), range(STEPS))
    validation = _plan(run, rank, world)
    first = validate(engine, validation, torch.device("cpu")) if every else None
    guard, lines = Guard(config.training.elastic, {}, []), []
    for number, micros in enumerate(plan):
        arrays = [collate([table.get(int(r)) for r in m], lambda n: read_features(source, n)) for m in micros]
        step = Step(number, arrays, sum(map(len, micros)))
        metrics, _, _ = train_step(engine, step, settings, config, torch.device("cpu"), guard)
        lines.append({"step": number + 1} | metrics)
        if every and (number + 1) % every == 0:
            lines[-1]["validation"] = validate(engine, validation, torch.device("cpu"))
    assert all(module.training for module in model.modules())
    return [{"validation": first}, *lines] if every else lines


def _worker(rank: int, world: int, run: TinyRun, out: Path) -> None:
    results = {"without": _train(run, rank, world, 0), "with": _train(run, rank, world, 2)}
    (out / f"{rank}.json").write_text(json.dumps(results))


@pytest.mark.timeout(300)
def test_validation_is_exact_and_training_does_not_notice_it(tiny_run, tmp_path):
    # Dropout draws random numbers, and the balance loss reads the record of the routers.
    tiny_run.config.stages.tune["tune"].lora.dropout = 0.2
    tiny_run.info.model["moe"] |= {"balance_coef": 0.01}
    run_world(2, partial(_worker, run=tiny_run, out=tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second

    start, *lines = first["with"]
    assert [line["step"] for line in lines if "validation" in line] == [2, 4, 6]
    plain = [{key: value for key, value in line.items() if key != "validation"} for line in lines]
    assert plain == first["without"] and len({line["loss"] for line in plain}) == STEPS

    # The same samples, one after the other in one process, before training.
    torch.manual_seed(SEED)
    model = start_model(tiny_run.config, tiny_run.info, "tune").eval()
    plan = _plan(tiny_run, 0, 1)
    table = SampleTable(Path(plan.source.samples))
    sums: dict[str, list[float]] = {}
    for row in (int(row) for _, rows in plan.micro_batches for row in rows):
        sample = table.get(row)
        with torch.no_grad():
            loss = model(to_batch(collate([sample], lambda name: read_features(plan.source, name))))
        sums.setdefault(sample.group, []).append((float(loss.token_loss), int(loss.answer_tokens)))
    assert {group: len(values) for group, values in sums.items()} == dict.fromkeys(sums, PER_GROUP)
    expected = {group: sum(a for a, _ in v) / sum(n for _, n in v) for group, v in sums.items()}
    assert start["validation"] == pytest.approx(expected, abs=2e-6) and len(expected) == 6
    assert lines[-1]["validation"] != start["validation"]


def test_groups_that_the_run_does_not_train_are_left_out(tiny_run):
    source = prepare.source(tiny_run.config, prepare.VALIDATION)
    settings = {"samples": 3, "seed": 0, "rank": 0, "world": 1, "max_tokens": 4096}
    plan = plan_validation(source, ["see", "ask", "gone"], **settings)
    assert plan.groups == ["image", "image+speech"]
    assert sorted(len(rows) for _, rows in plan.micro_batches) == [3, 3]
    again = plan_validation(source, ["see", "ask"], **settings)
    assert [rows.tolist() for _, rows in again.micro_batches] == [rows.tolist() for _, rows in plan.micro_batches]
    with pytest.raises(UsageError, match="training.validation.every .* dev split"):
        plan_validation(source, ["gone"], **settings)
