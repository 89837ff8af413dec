"""Tiny training runs for the tests of faults, and what they are compared by."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from tests.tiny import TinyRun, make_tiny_run
from unimoe_ray.data import prepare
from unimoe_ray.training.checkpoint import checkpoint_dir, read_weights
from unimoe_ray.training.recipe import recipe
from unimoe_ray.training.trainer import run_stage

# Adam's eps is above rounding noise, of which it would make steps of full size.
OPTIMIZER = {"eps": 1e-6}
ELASTIC = {"grow_after": 1.0, "hang_timeout": 8.0, "start_timeout": 30.0}


def make_run(root: Path, steps: int = 12, every: int = 4, **training) -> TinyRun:
    """Ready for stage 3, of so many steps; ``every``: steps between two states."""
    settings = {"optimizer": OPTIMIZER, "elastic": ELASTIC | training.pop("elastic", {})} | training
    run = make_tiny_run(root, training=settings, checkpoint={"every": every})
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


def lines(run: TinyRun, label: str = "tune", name: str = "metrics.jsonl") -> list[dict]:
    path = run.config.run_dir / name
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [line for line in found if line["run"] == label]


def steps_that_count(found: list[dict]) -> list[dict]:
    """The last time of each step, in order."""
    return [line for _, line in sorted({line["step"]: line for line in found}.items())]


def weights(run: TinyRun, stage: str = "tune", name: str = "tune") -> dict[str, torch.Tensor]:
    return read_weights(checkpoint_dir(run.config.run_dir, stage, name))


def again(run: TinyRun) -> None:
    """As if stage 3 had never been trained."""
    shutil.rmtree(checkpoint_dir(run.config.run_dir, "tune", "tune"), ignore_errors=True)
    shutil.rmtree(run.config.run_dir / "states", ignore_errors=True)
