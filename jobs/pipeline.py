"""The main job: prepare, stages 0 to 3, evaluation and report. Finished parts are not done again."""

from __future__ import annotations

import time

from jobs.arguments import run_job
from jobs.evaluate import evaluate
from unimoe_ray import pipeline
from unimoe_ray.config import Config
from unimoe_ray.progress import TrainProgress


def main(config: Config, progress: TrainProgress) -> None:
    started = time.perf_counter()
    pipeline.prepare(config, progress)
    pipeline.train(config, "all", progress)
    evaluate(config, progress, started)
    progress.message(f'talk to it: unimoe chat {config.run_dir} --image a.png "what shape is in the image?"')


if __name__ == "__main__":
    run_job(__doc__, main)
