"""What the runs of an experiment say: figures of each arm over seeds, and a verdict on each claim of the paper.

A verdict compares two arms seed by seed, which share all stages before the third: the mean difference with Student's
95 % interval over seeds. ``seen``: the interval lies on the claimed side of 0; ``not seen``: on the other; else
``undecided`` at this scale.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from unimoe_ray.experiments.arms import FAMILIES, Groups
from unimoe_ray.experiments.claims import claims
from unimoe_ray.experiments.figures import bias, estimate, loss_variance, smoothed, steps_to_90, verdict, worst_drop
from unimoe_ray.experiments.outcomes import Outcome, Seed
from unimoe_ray.experiments.plan import Experiment

CURVE_POINTS = 60
SHOWN = ("accuracy", "worst drop", "steps to 90 %", "loss variance")


def collect(experiment: Experiment, split: str, finished: Mapping[tuple[str, int], Outcome]) -> dict[str, Any]:
    """Figures of each arm and verdicts, as JSON; of what is finished, and says how much that is."""
    seeds: dict[int, dict[str, Outcome]] = {seed: {} for seed in experiment.seeds}
    for (arm, seed), outcome in finished.items():
        seeds[seed][arm] = outcome
    arms = {
        arm.name: {
            "about": arm.about,
            "figures": _figures(arm.name, list(seeds.values()), experiment.groups),
            "by seed": {str(seed): runs[arm.name].accuracy() for seed, runs in seeds.items() if arm.name in runs},
            "curve": _curve(arm.name, list(seeds.values())),
            "cost": _cost(arm.name, list(seeds.values())),
        }
        for arm in experiment.arms
    }
    verdicts, waiting = [], []
    for claim in claims(experiment.groups):
        about = {"claim": claim.name, "text": claim.text, "unit": claim.unit, "paper": asdict(claim.paper)}
        complete = [seed for seed in seeds.values() if all(arm in seed for arm in claim.arms)]
        if complete:
            found = estimate([claim.difference(seed) for seed in complete])
            verdicts.append(about | {"verdict": verdict(found)} | asdict(found))
        else:
            waiting.append(about | {"arms": list(claim.arms)})
    some = next((run for seed in seeds.values() for run in seed.values()), None)
    return {
        "split": split,
        "questions": {task: len(right) for task, right in some.correct.items()} if some else {},
        "seeds": list(experiment.seeds),
        "finished": sum(map(len, seeds.values())),
        "planned": len(experiment.arms) * len(experiment.seeds),
        "arms": arms,
        "claims": verdicts,
        "not judged": waiting,
        "families": FAMILIES,
    }


def to_json(found: dict[str, Any]) -> str:
    """The same, an arm and a claim a line; what is no number is null, others have six
    digits."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, float):
            return float(f"{value:.6g}") if math.isfinite(value) else None
        return value

    def spread(value: Any) -> str:
        if isinstance(value, dict) and any(isinstance(item, dict) for item in value.values()):
            return "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n }"
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            return "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in value) + "\n ]"
        return json.dumps(value)

    return "{\n" + ",\n".join(f" {json.dumps(k)}: {spread(v)}" for k, v in plain(found).items()) + "\n}\n"


def markdown(found: dict[str, Any]) -> str:
    """The tables of ``collect``."""
    lines = [
        f"{found['finished']} of {found['planned']} runs, split {found['split']}; mean over seeds with 95 % interval.",
        "",
        "| arm | accuracy | worst drop | steps to 90 % | loss variance | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for arm, about in found["arms"].items():
        figures = about["figures"]
        cells = [_cell(figures[name]) for name in SHOWN]
        lines.append(f"| {arm} | {' | '.join(cells)} | {figures['accuracy']['seeds']} |")
    lines += ["", "| claim | difference | verdict | seeds |", "|---|---|---|---|"]
    for claim in found["claims"]:
        lines.append(f"| {claim['text']} | {_cell(claim)} | {claim['verdict']} | {claim['seeds']} |")
    return "\n".join(lines) + "\n"


def _figures(arm: str, seeds: list[Seed], groups: Groups) -> dict[str, dict[str, float]]:
    mine = [seed for seed in seeds if arm in seed]
    compared = [seed for seed in mine if all(f"specialist-{name}" in seed for name in groups)]
    special = arm.startswith("specialist-")
    by_group = {
        name: partial(lambda tasks, seed: seed[arm].accuracy(tasks), tasks)
        for name, tasks in groups.items()
        if mine and all(set(tasks) & set(seed[arm].correct) for seed in mine)
    }
    values = {
        "accuracy": [seed[arm].accuracy() for seed in mine],
        "worst drop": [] if special else [worst_drop(seed, arm, groups) for seed in compared],
        "mean drop": [] if special else [bias(seed, arm, groups).mean for seed in compared],
        "steps to 90 %": [steps_to_90(seed[arm].losses) for seed in mine],
        "loss variance": [loss_variance(seed[arm].losses) for seed in mine],
    } | {name: [of(seed) for seed in mine] for name, of in by_group.items()}
    return {name: asdict(estimate(known)) for name, known in values.items()}


def _curve(arm: str, seeds: list[Seed]) -> list[list[float]]:
    """[step, mean over seeds of the smoothed loss] of at most CURVE_POINTS steps, the first and the last among them."""
    runs = [smoothed(seed[arm].losses) for seed in seeds if arm in seed and len(seed[arm].losses)]
    if not runs:
        return []
    length = min(map(len, runs))
    mean = np.mean([run[:length] for run in runs], axis=0)
    steps = np.unique(np.linspace(0, length - 1, min(CURVE_POINTS, length)).round().astype(int))
    return [[int(step) + 1, float(f"{mean[step]:.4g}")] for step in steps]


def _cost(arm: str, seeds: list[Seed]) -> dict[str, float]:
    """Parameters of the language model, those that one token passes, and seconds of stage 3 (median over seeds)."""
    runs = [seed[arm] for seed in seeds if arm in seed]
    seconds = [run.seconds for run in runs if run.seconds]
    return {
        "parameters": max((run.parameters for run in runs), default=0),
        "active": max((run.active for run in runs), default=0),
        "steps": max((len(run.losses) for run in runs), default=0),
        "seconds": statistics.median(seconds) if seconds else 0.0,
    }


def _cell(found: Mapping[str, Any]) -> str:
    mean, low, high = (found[key] for key in ("mean", "low", "high"))
    if mean is None or not math.isfinite(mean):
        return ""
    return f"{mean:.3g}" if low is None or not math.isfinite(low) else f"{mean:.3g} ({low:.3g} to {high:.3g})"
