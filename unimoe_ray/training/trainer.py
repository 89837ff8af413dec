"""The driver of a stage: Ray Train runs side by side, followed to their checkpoints."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from unimoe_ray.checkpoint.states import check_latest, states_folder
from unimoe_ray.config import Config
from unimoe_ray.config.training import STAGES
from unimoe_ray.data.samples import SampleTable, Source
from unimoe_ray.errors import UnimoeError, UsageError, root_cause
from unimoe_ray.parallel.cluster_topology import label_selectors
from unimoe_ray.parallel.groups import expert_parallel_size
from unimoe_ray.training.checkpoint import ModelInfo, checkpoint_dir, is_complete
from unimoe_ray.training.job import Job, train_worker
from unimoe_ray.training.recipe import decisive, recipe
from unimoe_ray.training.record import drop_after
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
        drop_after(config.run_dir, job.label, done[job.run])
    each = max(1, workers // len(jobs))
    if stage == "tune" and config.model.moe.layers != "none":
        expert_parallel_size(config.training.expert_parallel.ep_size, each, config.model.moe.num_experts)
    # Cores are shared by the operating system; a GPU belongs to one run at a time.
    turns = threading.Semaphore(max(1, workers // each) if use_gpu else len(jobs))
    errors: dict[str, BaseException] = {}
    threads = [
        threading.Thread(target=_fit, args=(job, config, each, use_gpu, turns, errors), daemon=True) for job in jobs
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        follow(metrics, [job.label for job in jobs])
        time.sleep(0.5)
    follow(metrics, [job.label for job in jobs])
    if errors:
        label, error = next(iter(errors.items()))
        raise UnimoeError(f"stage {label} failed: {root_cause(error)}") from error
    return [job.label for job in jobs]


def _fit(
    job: Job,
    config: Config,
    workers: int,
    use_gpu: bool,
    turns: threading.Semaphore,
    errors: dict[str, BaseException],
) -> None:
    resources = {"CPU": 1, "GPU": 1} if use_gpu else {"CPU": 1}
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker=resources,
            label_selector=label_selectors(workers, resources),
        ),
        run_config=RunConfig(
            name=f"{job.label.replace('/', '-')}-{time.time_ns()}",
            storage_path=str((config.run_dir / "ray_train").resolve()),
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
    )
    try:
        with turns:
            trainer.fit()
    except (ray.exceptions.RayError, ray.train.TrainingFailedError, RuntimeError, ValueError, OSError) as error:
        errors[job.label] = error


def _available(source: Source, tasks: dict[str, float], key: str) -> dict[str, float]:
    known = SampleTable(Path(source.samples)).by_task()
    missing = [task for task in tasks if task not in known]
    if unknown := [task for task in missing if task not in OPTIONAL_TASKS]:
        raise UsageError(f"{key}: no prepared samples of task '{unknown[0]}'; allowed: {', '.join(sorted(known))}")
    return {task: weight for task, weight in tasks.items() if task not in missing}
