"""What the runs of an experiment say: figures of each arm over seeds, and a verdict on each claim of the paper.

A verdict compares two arms seed by seed, which share all stages before the third: the mean difference with Student's
95 % interval over seeds. ``seen``: the interval lies on the claimed side of 0; ``not seen``: on the other; else
``undecided`` at this scale.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from unimoe_ray.config import Config
from unimoe_ray.evaluation.bias import Compared, performance_bias
from unimoe_ray.evaluation.intervals import Measure
from unimoe_ray.experiments.arms import Groups
from unimoe_ray.experiments.plan import Experiment, evaluation_dir, metrics

# Student's 97.5 % quantiles for 1, 2, ... degrees of freedom
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
SMOOTHING = 0.9
LAST_PART = 0.2


@dataclass(frozen=True)
class Outcome:
    """One finished run. correct: by task, of each question in the split's order; losses: of stage 3, by step."""

    correct: Mapping[str, Sequence[bool]]
    losses: Sequence[float]

    def accuracy(self, tasks: Sequence[str] | None = None) -> float:
        """Mean over tasks (those of these that were asked)."""
        asked = [task for task in self.correct if tasks is None or task in tasks]
        return statistics.fmean(statistics.fmean(self.correct[task]) for task in asked)


Seed = Mapping[str, Outcome]


@dataclass(frozen=True)
class Estimate:
    """Mean over ``seeds`` runs and its 95 % interval; without bounds from a single seed."""

    mean: float
    low: float
    high: float
    seeds: int


@dataclass(frozen=True)
class Claim:
    """``arms`` that it needs; ``difference`` of one seed, above 0 where the claim holds."""

    name: str
    text: str
    arms: tuple[str, ...]
    difference: Callable[[Seed], float]


def estimate(values: Sequence[float]) -> Estimate:
    """Of independent runs; those that are no number are left out."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = statistics.fmean(known)
    if len(known) == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    freedom = len(known) - 1
    quantile = _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else 1.96 + 2.6 / freedom
    margin = quantile * statistics.stdev(known) / math.sqrt(len(known))
    return Estimate(mean, mean - margin, mean + margin, len(known))


def verdict(found: Estimate) -> str:
    if found.low > 0:
        return "seen"
    return "not seen" if found.high < 0 else "undecided"


def read_outcome(config: Config, split: str) -> Outcome | None:
    """None for a run that is not finished."""
    path = evaluation_dir(config, split) / "eval_samples.jsonl"
    if not path.is_file():
        return None
    correct: dict[str, list[bool]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        correct.setdefault(sample["task"], []).append(sample["correct"])
    return Outcome(correct, [line["loss"] for line in metrics(config) if line["stage"] == "tune"])


def worst_drop(seed: Seed, arm: str, groups: Groups) -> float:
    """The largest drop behind a modality's specialist (``evaluation.bias``)."""
    return _bias(seed, arm, groups).worst


def steps_to_90(losses: Sequence[float]) -> float:
    """The step at which nine tenths of the fall from the first to the final smoothed loss are done; nan for a run that
    does not fall (one that starts where it ends)."""
    smooth = _smoothed(losses)
    if len(smooth) < 2 or smooth[-1] >= smooth[0]:
        return math.nan
    return float(np.argmax(smooth <= smooth[0] - 0.9 * (smooth[0] - smooth[-1]))) + 1


def loss_variance(losses: Sequence[float]) -> float:
    """Of the last fifth of the steps, about their straight line."""
    last = np.asarray(losses[-max(3, round(LAST_PART * len(losses))) :])
    if len(last) < 3:
        return math.nan
    steps = np.arange(len(last))
    return float(np.var(last - np.polyval(np.polyfit(steps, last, 1), steps)))


def claims(groups: Groups, scarce: str = "speech") -> list[Claim]:
    """The paper's, for the arms of ``arms.grid``. A mixture and a dense model are compared at equal active FLOPs, at
    equal steps of stage 3, and once more at equal steps in all."""

    def better(name: str, text: str, first: str, second: str) -> Claim:
        return Claim(name, text, (first, second), lambda s: s[first].accuracy() - s[second].accuracy())

    specialists = tuple(f"specialist-{name}" for name in groups)
    rare_arms = ("dense", "dense-rare", "experts-top1", "experts-top1-rare")

    def rare_gain(seed: Seed) -> float:
        lost = [
            seed[arm].accuracy(groups[scarce]) - seed[f"{arm}-rare"].accuracy(groups[scarce]) for arm in rare_arms[::2]
        ]
        return lost[0] - lost[1]

    return [
        better("mixture", "a mixture of experts beats one dense model of equal active FLOPs", "experts-top1", "dense"),
        Claim(
            "bias",
            "its worst drop behind a modality's specialist is smaller",
            ("experts-top1", "dense", *specialists),
            lambda s: worst_drop(s, "dense", groups) - worst_drop(s, "experts-top1", groups),
        ),
        Claim(
            "rare",
            f"it loses less on {scarce} where that is rare in training",
            rare_arms,
            rare_gain,
        ),
        better("mixture, all steps", "it does so against a dense model of as many steps", "experts-top1", "dense-long"),
        better("stage 2", "experts of stage 2 beat copies of the base", "experts", "copies"),
        better("stage 2, all steps", "they do so against copies of as many steps", "experts", "copies-long"),
        Claim(
            "speed",
            "they need fewer steps to nine tenths of the final loss",
            ("experts", "copies"),
            lambda s: steps_to_90(s["copies"].losses) - steps_to_90(s["experts"].losses),
        ),
        better("4 experts", "four experts beat two", "experts", "experts-2"),
        better("8 experts", "eight experts beat four", "experts-8", "experts"),
        better("top-2", "top-2 beats top-1", "experts", "experts-top1"),
        better("balance", "a balance loss harms pre-tuned experts", "experts", "experts-balance"),
        better("balance of copies", "a balance loss helps identical experts", "copies-balance", "copies"),
        better("interval", "experts in all layers beat every other layer", "experts", "experts-interval"),
        better("first half", "experts in all layers beat the first half", "experts", "experts-first"),
        better("second half", "experts in all layers beat the second half", "experts", "experts-second"),
    ]


def collect(experiment: Experiment, split: str) -> dict[str, Any]:
    """Figures of each arm and verdicts, as JSON; of what is finished, and says how much that is."""
    seeds: dict[int, dict[str, Outcome]] = {seed: {} for seed in experiment.seeds}
    for (arm, seed), config in experiment.runs().items():
        if outcome := read_outcome(config, split):
            seeds[seed][arm] = outcome
    figures = {arm.name: _arm_figures(arm.name, list(seeds.values()), experiment.groups) for arm in experiment.arms}
    verdicts = []
    for claim in claims(experiment.groups):
        complete = [seed for seed in seeds.values() if all(arm in seed for arm in claim.arms)]
        if complete:
            found = estimate([claim.difference(seed) for seed in complete])
            verdicts.append({"claim": claim.name, "text": claim.text, "verdict": verdict(found)} | asdict(found))
    finished = sum(map(len, seeds.values()))
    planned = len(experiment.arms) * len(experiment.seeds)
    return {"split": split, "finished": finished, "planned": planned, "arms": figures, "claims": verdicts}


def markdown(found: dict[str, Any]) -> str:
    """The tables of ``collect``."""
    lines = [
        f"{found['finished']} of {found['planned']} runs, split {found['split']}; mean over seeds with 95 % interval.",
        "",
        "| arm | accuracy | worst drop | steps to 90 % | loss variance | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for arm, figures in found["arms"].items():
        cells = [_cell(figures[name]) for name in ("accuracy", "worst drop", "steps to 90 %", "loss variance")]
        lines.append(f"| {arm} | {' | '.join(cells)} | {figures['accuracy']['seeds']} |")
    lines += ["", "| claim | difference | verdict | seeds |", "|---|---|---|---|"]
    for claim in found["claims"]:
        lines.append(f"| {claim['text']} | {_cell(claim)} | {claim['verdict']} | {claim['seeds']} |")
    return "\n".join(lines) + "\n"


def _arm_figures(arm: str, seeds: list[Seed], groups: Groups) -> dict[str, dict[str, float]]:
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
        "mean drop": [] if special else [_bias(seed, arm, groups).mean for seed in compared],
        "steps to 90 %": [steps_to_90(seed[arm].losses) for seed in mine],
        "loss variance": [loss_variance(seed[arm].losses) for seed in mine],
    } | {name: [of(seed) for seed in mine] for name, of in by_group.items()}
    return {name: asdict(estimate(known)) for name, known in values.items()}


def _bias(seed: Seed, arm: str, groups: Groups):
    def measure(outcome: Outcome, tasks: tuple[str, ...]) -> Measure:
        """Mean over tasks of their accuracies: each question weighs one over its task's."""
        asked = [task for task in tasks if task in outcome.correct]
        weights = [1 / len(outcome.correct[task]) / len(asked) for task in asked for _ in outcome.correct[task]]
        right = [float(x) for task in asked for x in outcome.correct[task]]
        return Measure("accuracy", np.array([[w * r, w] for w, r in zip(weights, right, strict=True)]))

    compared = {}
    for name, tasks in groups.items():
        specialist, model = (measure(seed[who], tasks) for who in (f"specialist-{name}", arm))
        compared[name] = Compared(specialist, model, range(len(model.sums)))
    return performance_bias(compared, resamples=1)


def _smoothed(losses: Sequence[float]) -> np.ndarray:
    """Exponential moving average, without the bias of its start."""
    total = weight = 0.0
    smooth = []
    for loss in losses:
        total, weight = SMOOTHING * total + loss, SMOOTHING * weight + 1
        smooth.append(total / weight)
    return np.array(smooth)


def _cell(found: Mapping[str, Any]) -> str:
    mean, low, high = (found[key] for key in ("mean", "low", "high"))
    if not math.isfinite(mean):
        return ""
    return f"{mean:.3g}" if not math.isfinite(low) else f"{mean:.3g} ({low:.3g} to {high:.3g})"
