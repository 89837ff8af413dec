"""Held-out answers of the run's model, its table and its report; then ``evaluation.benchmarks``, if it names some."""

from __future__ import annotations

import time
from pathlib import Path

from jobs.arguments import run_job
from unimoe_ray import pipeline
from unimoe_ray.config import Config
from unimoe_ray.evaluation.benchmark import Task, decoding_of
from unimoe_ray.evaluation.benchmarks import find_benchmark, open_folder
from unimoe_ray.evaluation.evaluate import write_evaluation
from unimoe_ray.progress import TrainProgress
from unimoe_ray.report import write_report
from unimoe_ray.tables import accuracy_table, benchmark_table


def evaluate(config: Config, progress: TrainProgress, started: float | None = None) -> None:
    """``started``: when the whole run began (``time.perf_counter``), for the report."""
    begun = time.perf_counter() if started is None else started
    tasks = benchmark_tasks(config)
    if earlier := pipeline.earlier_evaluation(config):
        scores = earlier["tasks"]
        progress.message("evaluation: finished already")
    else:
        result = pipeline.evaluate(config, progress)
        write_evaluation(config.run_dir, result, pipeline.stamp(config, time.perf_counter() - begun))
        scores = result.tasks
    report = write_report(config.run_dir)
    progress.console.print(accuracy_table(config, scores))
    progress.message(f"report: {report}")
    for task in tasks:
        progress.console.print(benchmark_table(config, task, pipeline.evaluate_benchmark(config, progress, task)))


def benchmark_tasks(config: Config) -> list[Task]:
    """What ``evaluation.benchmarks`` names, each with its default split, greedily. Raises UsageError."""
    tasks = []
    for name, folder in config.evaluation.benchmarks.items():
        benchmark, split = find_benchmark(name)
        found = open_folder(benchmark, Path(folder))
        tasks.append(Task(benchmark, found, split, decoding_of(benchmark, "greedy")))
    return tasks


if __name__ == "__main__":
    run_job(__doc__, evaluate)
