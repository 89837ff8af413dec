"""Figures of runs, intervals over seeds, and when a difference counts as seen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unimoe_ray.evaluation.bias import Bias, Compared, performance_bias
from unimoe_ray.evaluation.intervals import Measure
from unimoe_ray.experiments.arms import Groups
from unimoe_ray.experiments.outcomes import Outcome, Seed

# Student's 97.5 % quantiles for 1, 2, ... degrees of freedom
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
SMOOTHING = 0.9
LAST_PART = 0.2


@dataclass(frozen=True)
class Estimate:
    """Mean over ``seeds`` runs and its 95 % interval; without bounds from a single seed."""

    mean: float
    low: float
    high: float
    seeds: int


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


def worst_drop(seed: Seed, arm: str, groups: Groups) -> float:
    """The largest drop behind a modality's specialist (``evaluation.bias``)."""
    return bias(seed, arm, groups).worst


def bias(seed: Seed, arm: str, groups: Groups) -> Bias:
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


def steps_to_90(losses: Sequence[float]) -> float:
    """The step at which nine tenths of the fall from the first to the final smoothed loss are done; nan for a run that
    does not fall (one that starts where it ends)."""
    smooth = smoothed(losses)
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


def smoothed(losses: Sequence[float]) -> np.ndarray:
    """Exponential moving average, without the bias of its start."""
    total = weight = 0.0
    smooth = []
    for loss in losses:
        total, weight = SMOOTHING * total + loss, SMOOTHING * weight + 1
        smooth.append(total / weight)
    return np.array(smooth)
