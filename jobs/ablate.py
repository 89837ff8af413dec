"""The ablations of the mini suite: every arm of a grid over several seeds, and a verdict on each claim of the paper."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from jobs.arguments import told_in_a_line
from unimoe_ray import cluster, config
from unimoe_ray.experiments.arms import MINI_GROUPS
from unimoe_ray.experiments.plan import Experiment, make_experiment, plan, table
from unimoe_ray.experiments.results import collect, markdown, to_json
from unimoe_ray.experiments.run import run_experiment
from unimoe_ray.progress import TrainProgress
from unimoe_ray.report.ablation import write_ablation_page


def ablate(experiment: Experiment, split: str, slots: int, console: Console) -> None:
    """Run what is not finished, then ``report``."""
    cpus = max(slots, len(experiment.base.stages.experts)) + cluster.DATA_CPUS
    with cluster.connect(experiment.base, cpus), TrainProgress(console) as progress:
        run_experiment(experiment, split, slots, progress)
    report(experiment, split, console)


def report(experiment: Experiment, split: str, console: Console) -> None:
    """Of what is finished: ``results-SPLIT.json``, ``.md`` and ``.html`` in the folder of the runs."""
    found = collect(experiment, split)
    experiment.out.mkdir(parents=True, exist_ok=True)
    text = markdown(found)
    page = experiment.out / f"results-{split}.html"
    page.with_suffix(".json").write_text(to_json(found), encoding="utf-8")
    page.with_suffix(".md").write_text(text, encoding="utf-8")
    write_ablation_page(page, experiment.base.name, found)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)


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
        if arguments.dry_run:
            print(table(plan(experiment, arguments.split), arguments.slots), end="")
            return
        if arguments.report:
            report(experiment, arguments.split, Console())
            return
        ablate(experiment, arguments.split, arguments.slots, Console())


if __name__ == "__main__":
    main()
