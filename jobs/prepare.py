"""Media through the frozen towers into the feature store, conversations into token ids."""

from jobs.arguments import run_job
from unimoe_ray import pipeline

if __name__ == "__main__":
    run_job(__doc__, pipeline.prepare)
