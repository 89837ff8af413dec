"""What a run that goes on does to what was written before, and which random numbers it draws."""

from __future__ import annotations

import json
import multiprocessing
import random
from pathlib import Path

import numpy as np
import torch

from tests.tiny import make_tiny_run
from unimoe_ray.data import prepare
from unimoe_ray.training.loop import seed_step
from unimoe_ray.training.recipe import decisive, recipe
from unimoe_ray.training.record import METRICS, _append, drop_after


def test_lines_after_the_step_and_torn_ones_go(tmp_path):
    path = tmp_path / METRICS
    lines = [{"run": run, "step": step, "loss": step / 2} for step in (1, 2, 3) for run in ("tune", "experts/image")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"run": "tune", "st')
    (tmp_path / "findings.jsonl").write_text('{"run": "tune", "step": 3}\n{"run": "tune", "step": 2}\n')
    assert [line["step"] for line in drop_after(tmp_path, "tune", 2)] == [1, 2]
    left = [json.loads(line) for line in path.read_text().splitlines()]
    assert left == [line for line in lines if line["run"] != "tune" or line["step"] < 3]
    assert (tmp_path / "findings.jsonl").read_text() == '{"run": "tune", "step": 2}\n'
    assert drop_after(tmp_path, "tune", 0) == []
    assert {json.loads(line)["run"] for line in path.read_text().splitlines()} == {"experts/image"}
    assert drop_after(tmp_path / "none", "tune", 5) == []


def _write_many(folder: Path, run: str) -> None:
    for step in range(200):
        _append(folder / METRICS, {"run": run, "step": step})


def test_no_line_of_another_run_is_lost_meanwhile(tmp_path):
    # Not forked: tests before this one leave threads and handlers of signals in this process.
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=_write_many, args=(tmp_path, run), daemon=True) for run in "ab"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        drop_after(tmp_path, "c", 0)
        _append(tmp_path / METRICS, {"run": "c", "step": 1})
    assert [writer.exitcode for writer in writers] == [0, 0]
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    for run in "ab":
        assert [line["step"] for line in lines if line["run"] == run] == list(range(200))


def test_random_numbers_of_a_step_depend_on_nothing_before_it():
    def draw(*step: int) -> tuple:
        seed_step(*step)
        return torch.rand(3).tolist(), np.random.rand(), random.random()

    first = draw(7, 5, 0)
    torch.rand(100)
    assert draw(7, 5, 0) == first
    others = [first, draw(8, 5, 0), draw(7, 6, 0), draw(7, 5, 1)]
    assert all(len({repr(numbers[kind]) for numbers in others}) == len(others) for kind in range(3))


def test_what_decides_a_run_changes_with_it_and_only_with_it(tmp_path):
    run = make_tiny_run(tmp_path)
    source = prepare.source(run.config, "train")
    tasks = run.config.stages.tune["tune"].tasks

    def made_by() -> tuple[dict, str]:
        return (
            decisive(run.config, "tune", "tune", run.info, source, dict(tasks)),
            recipe(run.config, "tune", "tune", run.info, source),
        )

    before, hashed = made_by()
    assert json.loads(json.dumps(before)) == before
    run.config.training.max_tokens_per_micro_batch, run.config.training.zero_stage = 99, 1
    run.config.checkpoint.every, run.config.placement.interval = 7, 3
    assert made_by() == (before, hashed)
    run.config.stages.tune["tune"].batch_size += 1
    after, changed = made_by()
    differing = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert differing == {"stages.tune.tune.batch_size", "data plan"} and changed != hashed
    run.config.stages.tune["tune"].batch_size -= 1
    run.config.seed = 1
    after, _ = made_by()
    assert {"seed", "data plan", "model of experts/image"} <= {key for key in before if before[key] != after[key]}
