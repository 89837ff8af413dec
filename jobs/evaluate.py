"""Held-out answers of the run's model, its table and its report."""

from __future__ import annotations

import time

from jobs.arguments import run_job
from unimoe_ray import pipeline
from unimoe_ray.config import Config
from unimoe_ray.evaluation.evaluate import write_evaluation
from unimoe_ray.progress import TrainProgress
from unimoe_ray.report import write_report
from unimoe_ray.tables import accuracy_table


def evaluate(config: Config, progress: TrainProgress, started: float | None = None) -> None:
    """``started``: when the whole run began (``time.perf_counter``), for the report."""
    begun = time.perf_counter() if started is None else started
    if earlier := pipeline.earlier_evaluation(config):
        tasks = earlier["tasks"]
        progress.message("evaluation: finished already")
    else:
        result = pipeline.evaluate(config, progress)
        write_evaluation(config.run_dir, result, pipeline.stamp(config, time.perf_counter() - begun))
        tasks = result.tasks
    report = write_report(config.run_dir)
    progress.console.print(accuracy_table(config, tasks))
    progress.message(f"report: {report}")


if __name__ == "__main__":
    run_job(__doc__, evaluate)
