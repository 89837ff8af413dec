"""Which runs there are, which are finished, and how long the rest will take."""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from unimoe_ray.config import Config
from unimoe_ray.config.training import STAGES
from unimoe_ray.errors import UsageError
from unimoe_ray.experiments.arms import Arm, Groups, arm_config, grid, trunk_config
from unimoe_ray.training.checkpoint import checkpoint_dir

# Seconds of a step of the mini preset on one core (AMD EPYC, AVX2); used until runs of the experiment are there.
SECONDS = {"base": 0.40, "align": 0.35, "experts": 0.50, "dense": 0.45, "mixture": 0.75}
EVALUATION_SECONDS = 20.0


@dataclass(frozen=True)
class Experiment:
    """base: the configuration that the arms change; out: the folder of all runs and results."""

    base: Config
    arms: tuple[Arm, ...]
    groups: Groups
    seeds: tuple[int, ...]
    out: Path

    def trunks(self) -> dict[int, Config]:
        return {seed: trunk_config(self.base, seed, str(self.out)) for seed in self.seeds}

    def runs(self) -> dict[tuple[str, int], Config]:
        """By arm and seed, seed by seed: an experiment that is cut short has whole seeds."""
        return {
            (arm.name, seed): arm_config(self.base, arm, seed, str(self.out))
            for seed in self.seeds
            for arm in self.arms
        }


def make_experiment(
    base: Config, groups: Groups, seeds: Sequence[int], out: Path, names: Sequence[str] | None = None
) -> Experiment:
    """``names``: of arms; all if not given. Raises UsageError for an unknown one, and without seeds."""
    arms = grid(groups)
    for name in names or ():
        if name not in arms:
            raise UsageError(f"--arm {name}: no such arm; allowed: {', '.join(arms)}")
    if not seeds:
        raise UsageError("--seeds: allowed: from 1")
    chosen = tuple(arms[name] for name in dict.fromkeys(names or arms))
    return Experiment(base, chosen, groups, tuple(seeds), out.resolve())


@dataclass(frozen=True)
class Planned:
    """seconds: of one core; 0 for what is finished."""

    name: str
    about: str
    steps: int
    seconds: float


def plan(experiment: Experiment, split: str, known: Collection[tuple[str, int]] = ()) -> list[Planned]:
    """All runs in their order. Finished is what has its files (whether they fit is seen when it is run) or is known."""
    rate = SECONDS | measured_seconds(experiment)
    rows = []
    for trunk, config in experiment.trunks().items():
        steps = seconds = 0
        needed = any(run not in known for run in experiment.runs() if run[1] == trunk)
        for stage in STAGES[:-1]:
            for name, run in getattr(config.stages, stage).items():
                steps += run.steps
                if needed and not (checkpoint_dir(config.run_dir, stage, name) / "manifest.json").is_file():
                    seconds += run.steps * rate[stage]
        rows.append(Planned(config.name, "stages 0 to 2, common to the seed", steps, seconds))
    about = {arm.name: arm.about for arm in experiment.arms}
    for (arm, seed), config in experiment.runs().items():
        steps = config.stages.tune["tune"].steps
        seconds = 0.0
        if (arm, seed) not in known and not (evaluation_dir(config, split) / "eval.json").is_file():
            seconds = steps * rate[_kind(config)] + EVALUATION_SECONDS
        rows.append(Planned(config.name, about[arm], steps, seconds))
    return rows


def table(rows: list[Planned], slots: int) -> str:
    """For a dry run."""
    width = max(len(row.name) for row in rows)
    lines = [
        f"{row.name:{width}}  {row.steps:5} steps  {f'{row.seconds / 60:5.1f} min' if row.seconds else ' finished'}  "
        f"{row.about}"
        for row in rows
    ]
    left = sum(row.seconds for row in rows)
    total = f"{len(rows)} runs, {left / 3600:.1f} core hours left, about {left / 60 / slots:.0f} min on {slots} cores"
    return "\n".join([*lines, total]) + "\n"


def measured_seconds(experiment: Experiment) -> dict[str, float]:
    """Median seconds between steps, by kind of run, of all that was trained so far."""
    seconds: dict[str, list[float]] = {}
    for config in (*experiment.trunks().values(), *experiment.runs().values()):
        lines = metrics(config)
        for before, after in zip(lines, lines[1:], strict=False):
            if before["run"] == after["run"]:
                kind = _kind(config) if after["stage"] == "tune" else after["stage"]
                seconds.setdefault(kind, []).append(after["time"] - before["time"])
    return {kind: statistics.median(values) for kind, values in seconds.items()}


def metrics(config: Config) -> list[dict]:
    """The lines of a run's ``metrics.jsonl``, by run and step; none if there are none yet."""
    path = config.run_dir / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted(lines, key=lambda line: (line["stage"], line["run"], line["step"]))


def evaluation_dir(config: Config, split: str) -> Path:
    return config.run_dir / "evaluations" / split


def _kind(config: Config) -> str:
    return "dense" if config.model.moe.layers == "none" else "mixture"
