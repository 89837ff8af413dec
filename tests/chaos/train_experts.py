"""Driver of test_kill: trains stage 2 of a tiny run, as a command that can be killed."""

import pickle
import sys
from pathlib import Path

from unimoe_ray import cluster
from unimoe_ray.data import prepare
from unimoe_ray.training.trainer import run_stage

if __name__ == "__main__":
    run = pickle.loads(Path(sys.argv[1]).read_bytes())
    with cluster.connect(run.config):
        source = prepare.source(run.config, "train")
        trained = run_stage(
            run.config, "experts", run.info, source, run.tokenizer, workers=2, use_gpu=False, follow=lambda *_: None
        )
    print("trained", *trained)
