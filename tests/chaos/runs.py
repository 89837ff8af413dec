"""Tiny training runs for the tests of faults, and what they are compared by."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.chaos import faults
from tests.tiny import TinyRun, make_tiny_run
from unimoe_ray.data import prepare
from unimoe_ray.training.checkpoint import checkpoint_dir, read_weights
from unimoe_ray.training.recipe import recipe
from unimoe_ray.training.trainer import run_stage

# Adam's eps is above rounding noise, of which it would make steps of full size.
OPTIMIZER = {"eps": 1e-6}
ELASTIC = {"grow_after": 1.0, "hang_timeout": 90.0, "start_timeout": 60.0, "standby_every": None}


def make_run(root: Path, steps: int = 12, every: int = 4, model: dict | None = None) -> TinyRun:
    """Ready for stage 3, of so many steps; ``every``: steps between two states."""
    settings = {"optimizer": OPTIMIZER, "elastic": ELASTIC}
    run = make_tiny_run(root, training=settings, checkpoint={"every": every}, model=model or {})
    run.config.stages.tune["tune"].steps = steps
    source = prepare.source(run.config, "train")
    for name in run.config.stages.experts:
        manifest = checkpoint_dir(run.config.run_dir, "experts", name) / "manifest.json"
        made_by = recipe(run.config, "experts", name, run.info, source)
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"recipe": made_by}))
    return run


def train(run: TinyRun, stage: str = "tune", workers: int = 2, follow: Callable[[], None] = lambda: None) -> list[str]:
    source = prepare.source(run.config, "train")
    return run_stage(
        run.config,
        stage,
        run.info,
        source,
        run.tokenizer,
        workers=workers,
        use_gpu=False,
        follow=lambda *_: follow(),
    )


def at(run: TinyRun, folder: Path, actions: dict[int, Callable[[], None]], label: str = "tune") -> Callable[[], None]:
    """For ``follow`` of ``train``: does something while the workers hold before a step (``faults.hold_at``), or wait
    there for what comes of it (``faults.wait_at``)."""
    left = dict(actions)

    def follow() -> None:
        found = lines(run, label)
        for step in [step for step in left if found and found[-1]["step"] == step - 1]:
            if len(faults.there(folder, label, step)) < found[-1]["world"]:
                continue
            left.pop(step)()
            faults.let_go(folder, step)

    return follow


def same(run: TinyRun, undisturbed: Undisturbed, label: str = "tune") -> list[dict]:
    """The lines of a run that was disturbed, after a check: each step is there once, with the loss, the samples and at
    the end the weights of the one that was not."""
    found = lines(run, label)
    assert [line["step"] for line in found] == [line["step"] for line in undisturbed.lines]
    for line, other in zip(found, undisturbed.lines, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert [line[key] for key in ("samples", "tokens", "modality")] == [
            other[key] for key in ("samples", "tokens", "modality")
        ]
    now = weights(run)
    assert now.keys() == undisturbed.weights.keys()
    for name, tensor in now.items():
        assert (tensor - undisturbed.weights[name]).abs().max() <= 1e-4, name
    return found


@dataclass(frozen=True)
class Undisturbed:
    lines: list[dict]
    weights: dict[str, torch.Tensor]

    @classmethod
    def of(cls, run: TinyRun, workers: int = 2) -> Undisturbed:
        train(run, workers=workers)
        return cls(lines(run), weights(run))


def stops(run: TinyRun, label: str = "tune") -> list[dict]:
    return [event for event in lines(run, label, "events.jsonl") if event["event"] == "stop"]


def recoveries(run: TinyRun, label: str = "tune") -> list[dict]:
    """Also of those whose first step was done again."""
    return [event for event in lines(run, label, "events.jsonl") if event["event"] == "recovered"]


def lines(run: TinyRun, label: str = "tune", name: str = "metrics.jsonl") -> list[dict]:
    path = run.config.run_dir / name
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [line for line in found if line["run"] == label]


def weights(run: TinyRun, stage: str = "tune", name: str = "tune") -> dict[str, torch.Tensor]:
    return read_weights(checkpoint_dir(run.config.run_dir, stage, name))


def again(run: TinyRun) -> None:
    """As if stage 3 had never been trained."""
    shutil.rmtree(checkpoint_dir(run.config.run_dir, "tune", "tune"), ignore_errors=True)
    shutil.rmtree(run.config.run_dir / "states", ignore_errors=True)
