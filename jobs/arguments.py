"""What the command lines of all jobs share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from unimoe_ray import config, pipeline
from unimoe_ray.config import Config
from unimoe_ray.errors import UnimoeError
from unimoe_ray.progress import TrainProgress


@contextmanager
def told_in_a_line() -> Iterator[None]:
    """Mistakes and interrupts of a job: one line, and exit code 1 or 2."""
    try:
        yield
    except UnimoeError as error:
        print(f"unimoe: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("unimoe: stopped; the same command goes on where it was", file=sys.stderr)
        sys.exit(1)


def run_job(description: str, work: Callable[[Config, TrainProgress], None]) -> None:
    """Parse ``--config`` and overrides, hold the run folder, join or start Ray, do the work; exit with 0, 1 or 2."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", default="mini", help="preset name or YAML file (default: mini)")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="configuration overrides")
    arguments = parser.parse_intermixed_args()
    with told_in_a_line():
        settings = config.load(arguments.config, arguments.overrides)
        if arguments.dry_run:
            print(config.dump(settings), end="")
            return
        with pipeline.session(settings) as progress:
            work(settings, progress)
