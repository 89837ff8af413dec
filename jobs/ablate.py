"""The ablations of the mini suite: every arm of a grid over several seeds, and a verdict on each claim of the paper."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from jobs.arguments import told_in_a_line
from unimoe_ray import cluster, config
from unimoe_ray.experiments.arms import MINI_GROUPS
from unimoe_ray.experiments.cache import cached
from unimoe_ray.experiments.plan import Experiment, make_experiment, plan, table
from unimoe_ray.experiments.publish import cache_of, publish
from unimoe_ray.experiments.run import run_experiment
from unimoe_ray.progress import TrainProgress


def ablate(experiment: Experiment, split: str, slots: int, results: Path | None, console: Console) -> None:
    """Run what is not finished, neither here nor in ``results``."""
    known = cached(experiment, split, cache_of(results))
    if all(run in known for run in experiment.runs()):
        return
    cpus = max(slots, len(experiment.base.stages.experts)) + cluster.DATA_CPUS
    with cluster.connect(experiment.base, cpus), TrainProgress(console) as progress:
        run_experiment(experiment, split, slots, progress, known)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--config", default="mini", help="preset name or YAML file that the arms change (default: mini)"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="as many, from the configuration's on (default: 3)"
    )
    parser.add_argument("--arm", action="append", metavar="NAME", help="only this arm (repeatable)")
    parser.add_argument("--out", type=Path, default=Path("runs/ablate"), help="folder of all runs and results")
    parser.add_argument(
        "--split", choices=["dev", "test"], default="dev", help="test: once, when nothing changes any more"
    )
    parser.add_argument("--slots", type=int, default=2, metavar="N", help="runs side by side, a core each (default: 2)")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help="folder that keeps figures and outcomes; runs in it are not run again",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the runs and how long they will take, and stop")
    parser.add_argument("--report", action="store_true", help="train nothing, write the report of what is finished")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="configuration overrides")
    return parser.parse_intermixed_args()


def main() -> None:
    arguments = _parse()
    with told_in_a_line():
        base = config.load(arguments.config, arguments.overrides)
        seeds = range(base.seed, base.seed + arguments.seeds)
        experiment = make_experiment(base, MINI_GROUPS, seeds, arguments.out, arguments.arm)
        split, results, console = arguments.split, arguments.results, Console()
        if arguments.dry_run:
            known = cached(experiment, split, cache_of(results))
            print(table(plan(experiment, split, known), arguments.slots), end="")
            return
        if not arguments.report:
            ablate(experiment, split, arguments.slots, results, console)
        page, tables = publish(experiment, split, results)
        for text in (tables, f"report: {page}"):
            console.print(text, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
