"""Stage 2: one expert per modality, side by side."""

from jobs.arguments import run_job
from unimoe_ray import pipeline

if __name__ == "__main__":
    run_job(__doc__, lambda config, progress: pipeline.train(config, "experts", progress))
