"""The runs of an experiment: a seed's common stages first, then its arms side by side. Finished parts are not done
again; a part that fails stops the others from starting, and the next call goes on from there."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Collection
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unimoe_ray import pipeline
from unimoe_ray.config import Config
from unimoe_ray.data.prepare import data_dir
from unimoe_ray.evaluation.evaluate import final_model, write_evaluation
from unimoe_ray.experiments.plan import Experiment, evaluation_dir
from unimoe_ray.progress import TrainProgress
from unimoe_ray.training.checkpoint import checkpoint_dir, recipe

TRUNK_STAGES = ("base", "align", "experts")


def run_experiment(
    experiment: Experiment, split: str, slots: int, progress: TrainProgress, known: Collection[tuple[str, int]] = ()
) -> None:
    """Needs Ray, with a core for each slot and some for data. ``split`` is what the arms are evaluated on: ``dev``
    while anything is still being chosen, ``test`` once. known: arms and seeds that need not be run."""
    trunks = experiment.trunks()
    left = {run: config for run, config in experiment.runs().items() if run not in known}
    for config in (trunks[seed] for seed in dict.fromkeys(seed for _, seed in left)):
        shown = _Named(progress, config.name)
        with pipeline.open_run(config):
            pipeline.prepare(config, shown)
            for stage in TRUNK_STAGES:
                pipeline.train(config, stage, shown)
    pool = ThreadPoolExecutor(slots, thread_name_prefix="arm")
    try:
        futures = [
            pool.submit(run_arm, trunks[seed], config, split, _Named(progress, config.name))
            for (_, seed), config in left.items()
        ]
        done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
        for future in waiting:
            future.cancel()
        wait(waiting)  # for those that had begun
        for future in done:
            future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def run_arm(trunk: Config, config: Config, split: str, progress: _Named) -> None:
    """Stage 3 of one arm from the checkpoints of its trunk, and its answers."""
    started = time.perf_counter()
    with pipeline.open_run(config):
        fork(trunk, config)
        pipeline.train(config, "tune", progress)
        folder = evaluation_dir(config, split)
        model = recipe(final_model(config))
        if _evaluated(folder) == model:
            progress.message("finished already")
            return
        result = pipeline.evaluate(config, progress, split=split, stage="tune")
        folder.mkdir(parents=True, exist_ok=True)
        write_evaluation(folder, result, pipeline.stamp(config, time.perf_counter() - started))


def fork(trunk: Config, config: Config) -> None:
    """The trunk's prepared data and checkpoints into the run folder, as links to the same files. What is there already
    is replaced, but for stage 3."""
    folders = [data_dir(trunk)]
    for stage in TRUNK_STAGES:
        folders += [checkpoint_dir(trunk.run_dir, stage, run) for run in getattr(trunk.stages, stage)]
    for folder in folders:
        copy = config.run_dir / folder.relative_to(trunk.run_dir)
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _evaluated(folder: Path) -> str | None:
    path = folder / "eval.json"
    return json.loads(path.read_text(encoding="utf-8")).get("model") if path.is_file() else None


@dataclass(frozen=True)
class _Named:
    """A progress display shared by runs whose stages have the same names."""

    shown: TrainProgress
    name: str

    def update(self, run: str, metrics: dict[str, Any], total: int) -> None:
        self.shown.update(f"{self.name}: {run}", metrics, total)

    def count(self, what: str, done: int, total: int | None) -> None:
        self.shown.count(f"{self.name}: {what}", done, total)

    def message(self, text: str) -> None:
        self.shown.message(f"{self.name}: {text}")

    def done(self, run: str) -> None:
        self.shown.done(f"{self.name}: {run}")
