"""The driver of a stage: Ray Train runs side by side, followed to their checkpoints."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import ray
import ray.train

from unimoe_ray.config import Config
from unimoe_ray.config.training import STAGES
from unimoe_ray.data.samples import SampleTable, Source
from unimoe_ray.errors import UnimoeError, UsageError, root_cause
from unimoe_ray.parallel.groups import expert_parallel_size
from unimoe_ray.training.checkpoint import ModelInfo, checkpoint_dir, is_complete
from unimoe_ray.training.fit import fit
from unimoe_ray.training.job import Job
from unimoe_ray.training.pool import Pool
from unimoe_ray.training.recovery import DRIVER, EVENTS, STOP, read_lines, write_event
from unimoe_ray.training.stages import parents

# Tasks that a machine may lack the packages for; a mixture goes on without them.
OPTIONAL_TASKS = {"fashion", "words_fashion"}


def run_stage(
    config: Config,
    stage: str,
    info: ModelInfo,
    source: Source,
    tokenizer: Path,
    *,
    workers: int,
    use_gpu: bool,
    follow: Callable[[Path, list[str]], None],
) -> list[str]:
    """Train what a stage still lacks and return the labels of the runs trained (none: all were finished).

    ``follow(metrics path, labels)`` is called about twice a second while the runs go on.
    Raises UsageError for a stage or task that does not exist and for an ``ep_size`` that does not fit the workers,
    UnimoeError when an earlier stage is missing or a run fails.
    """
    if stage not in STAGES:
        raise UsageError(f"stage '{stage}' does not exist; allowed: {', '.join(STAGES)}, all")
    runs = getattr(config.stages, stage)
    for before, run in parents(config, stage):
        folder = checkpoint_dir(config.run_dir, before, run)
        if not is_complete(folder, recipe(config, before, run, info, source)):
            raise UnimoeError(
                f"stage {stage} starts from {folder}, which is missing or was made with other settings; "
                f"run 'unimoe train {before}' first"
            )
    # Workers run in folders of their own.
    tree = config.model_dump(mode="json") | {"runs_dir": str(Path(config.runs_dir).resolve())}
    jobs = []
    for name in runs:
        folder = checkpoint_dir(config.run_dir, stage, name)
        made_by = recipe(config, stage, name, info, source)
        if not is_complete(folder, made_by):
            tasks = _available(source, runs[name].tasks, f"stages.{stage}.{name}.tasks")
            files = str(tokenizer.resolve()), str(folder.resolve())
            jobs.append(Job(tree, asdict(info), stage, name, source, tasks, *files, made_by))
    if not jobs:
        return []
    metrics = config.run_dir / "metrics.jsonl"
    for path in (metrics, config.run_dir / "findings.jsonl", config.run_dir / EVENTS):
        _forget(path, {job.label for job in jobs})
    if stage == "tune" and config.model.moe.layers != "none":
        expert_parallel_size(config.training.expert_parallel.ep_size, workers, config.model.moe.num_experts)
    errors = _fit_all(jobs, config, workers, use_gpu, lambda: follow(metrics, [job.label for job in jobs]))
    if errors:
        label, error = next(iter(errors.items()))
        raise UnimoeError(f"stage {label} failed: {_reason(config.run_dir, label, error)}") from error
    return [job.label for job in jobs]


def _fit_all(
    jobs: list[Job], config: Config, workers: int, use_gpu: bool, follow: Callable[[], None]
) -> dict[str, BaseException]:
    """All at once, as far as there are workers; those of a finished run go to the others. The errors of those that
    failed, by label."""
    running = [job.label for job in jobs]
    # Cores are shared by the operating system; a GPU belongs to one run at a time.
    pool = Pool(
        path=config.run_dir.resolve() / "ray_train" / "pool.json",
        workers=workers if use_gpu else max(workers, len(jobs)),
        least=config.training.elastic.min_workers,
        need={"CPU": 1, "GPU": 1} if use_gpu else {"CPU": 1},
    )
    pool.announce(running)
    errors: dict[str, BaseException] = {}

    def run(job: Job) -> None:
        write_event(config.run_dir, job.label, DRIVER)
        try:
            fit(job, config, pool, use_gpu)
        except (ray.exceptions.RayError, ray.train.TrainingFailedError, RuntimeError, ValueError, OSError) as error:
            errors[job.label] = error

    threads = {job.label: threading.Thread(target=run, args=(job,), daemon=True) for job in jobs}
    for thread in threads.values():
        thread.start()
    while running:
        follow()
        time.sleep(0.5)
        if done := [label for label in running if not threads[label].is_alive()]:
            running = [label for label in running if label not in done]
            pool.announce(running)
    follow()
    return errors


def _reason(folder: Path, label: str, error: BaseException) -> str:
    """In one line: what the controller saw of a failed worker, else what Ray says."""
    stops = [event for event in read_lines(folder / EVENTS, label) if event["event"] == STOP]
    if isinstance(error, ray.train.WorkerGroupError) and stops:
        ours = [cause for cause in error.worker_failures.values() if isinstance(cause, UnimoeError)]
        return str(ours[0]) if ours else stops[-1]["text"]
    return root_cause(error)


def _available(source: Source, tasks: dict[str, float], key: str) -> dict[str, float]:
    known = SampleTable(Path(source.samples)).by_task()
    missing = [task for task in tasks if task not in known]
    if unknown := [task for task in missing if task not in OPTIONAL_TASKS]:
        raise UsageError(f"{key}: no prepared samples of task '{unknown[0]}'; allowed: {', '.join(sorted(known))}")
    return {task: weight for task, weight in tasks.items() if task not in missing}


def recipe(config: Config, stage: str, run: str, info: ModelInfo, source: Source) -> str:
    """A hash of all that decides what a run learns, earlier stages included; a checkpoint with another one is trained
    again."""
    samples = _file_hash(source.samples, Path(source.samples).stat().st_mtime_ns)
    earlier = [recipe(config, before, name, info, source) for before, name in parents(config, stage)]
    optimizer = config.training.optimizer.model_dump(mode="json")
    settings = getattr(config.stages, stage)[run].model_dump(mode="json")
    moe = config.model.moe.model_dump(mode="json") if stage == "tune" else None
    dense = replace(info, model={k: v for k, v in info.model.items() if k != "moe"})
    parts = [stage, run, config.seed, settings, optimizer, moe, asdict(dense), samples, earlier]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=4)
def _file_hash(path: str, changed_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _forget(path: Path, labels: set[str]) -> None:
    """Drop the lines of runs that start again."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        path.write_text("".join(f"{line}\n" for line in lines if _label(line) not in labels | {None}), encoding="utf-8")


def _label(line: str) -> Any:
    try:
        return json.loads(line)["run"]
    except (ValueError, KeyError):
        return None
