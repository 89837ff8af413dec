"""Stage 0: a tiny language model on media put into words."""

from jobs.arguments import run_job
from unimoe_ray import pipeline

if __name__ == "__main__":
    run_job(__doc__, lambda config, progress: pipeline.train(config, "base", progress))
