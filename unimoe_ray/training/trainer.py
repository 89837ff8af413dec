"""The driver of a stage: Ray Train runs side by side, followed to their checkpoints."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import ray
import ray.train

from unimoe_ray.checkpoint.states import check_latest, states_folder
from unimoe_ray.config import Config
from unimoe_ray.config.training import STAGES
from unimoe_ray.data.samples import SampleTable, Source
from unimoe_ray.errors import UnimoeError, UsageError, root_cause
from unimoe_ray.parallel.groups import expert_parallel_size
from unimoe_ray.training.checkpoint import ModelInfo, checkpoint_dir, is_complete
from unimoe_ray.training.fit import fit
from unimoe_ray.training.job import Job
from unimoe_ray.training.pool import Pool
from unimoe_ray.training.recipe import decisive, recipe
from unimoe_ray.training.record import drop_after
from unimoe_ray.training.recovery import DRIVER, EVENTS, STOP, forget_events, last_step, read_lines, write_event
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
    jobs, done = [], {}
    for name in runs:
        folder = checkpoint_dir(config.run_dir, stage, name)
        made_by = recipe(config, stage, name, info, source)
        if not is_complete(folder, made_by):
            tasks = _available(source, runs[name].tasks, f"stages.{stage}.{name}.tasks")
            files = str(tokenizer.resolve()), str(folder.resolve())
            states = states_folder(config, stage, name)
            decides = decisive(config, stage, name, info, source, tasks)
            done[name] = check_latest(states, decides)
            jobs.append(Job(tree, asdict(info), stage, name, source, tasks, *files, made_by, states.location, decides))
    if not jobs:
        return []
    metrics = config.run_dir / "metrics.jsonl"
    for job in jobs:
        _begin(config.run_dir, job.label, done[job.run])
    if stage == "tune" and config.model.moe.layers != "none":
        expert_parallel_size(config.training.expert_parallel.ep_size, workers, config.model.moe.num_experts)
    errors = _fit_all(jobs, config, workers, use_gpu, lambda: follow(metrics, [job.label for job in jobs]))
    if errors:
        label, error = next(iter(errors.items()))
        raise UnimoeError(f"stage {label} failed: {_reason(config.run_dir, label, error)}") from error
    return [job.label for job in jobs]


def _begin(folder: Path, label: str, done: int) -> None:
    """What was written of the steps that come again goes; of a run that begins anew, all."""
    reached = last_step(folder, label)
    drop_after(folder, label, done)
    if not done:
        forget_events(folder, label)
    write_event(folder, label, DRIVER, reached=reached if done else 0)


def _fit_all(
    jobs: list[Job], config: Config, workers: int, use_gpu: bool, follow: Callable[[], None]
) -> dict[str, BaseException]:
    """All at once, as far as there are workers; those of a finished run go to the others. The errors of those that
    failed, by label."""
    running = [job.label for job in jobs]
    pool = Pool(
        path=config.run_dir.resolve() / "ray_train" / "pool.json",
        workers=workers,
        least=config.training.elastic.min_workers,
        need={"CPU": 1, "GPU": 1} if use_gpu else {"CPU": 1},
        side_by_side=not use_gpu,
    )
    pool.announce(running)
    errors: dict[str, BaseException] = {}

    def run(job: Job) -> None:
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
