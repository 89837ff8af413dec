"""Prepares pictures with two workers, as a process to be killed: FOLDER NUMBER-OF-PICTURES SECONDS-FOR-EACH."""

import os
import sys
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "disabled"

import ray

from tests.stand_in_tower import StandInJob, pictures

if __name__ == "__main__":
    root, count, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    job = StandInJob(root, "job", pictures(root.parent / "pictures", count), seconds)
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    ray.data.DataContext.get_current().enable_progress_bars = False
    print(job.prepare(workers=2))
