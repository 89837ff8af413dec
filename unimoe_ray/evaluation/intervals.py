"""Confidence intervals by the bootstrap, over groups of questions that belong together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2_000
CONFIDENCE = 0.95
_NUMBERS = 2**22  # random numbers drawn at a time


def ratio(sums: np.ndarray) -> np.ndarray:
    """[..., 2] sums of scores and of what they are out of -> [...]; nan for nothing out of nothing."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


@dataclass(frozen=True)
class Measure:
    """A figure of a benchmark as a function of sums over its questions.

    sums: [n, k] float64, what each question adds; value: [..., k] -> [...]. For a mean these are the score and 1, with
    0 and 0 for questions that are not part of it. ``value`` of the sums over all questions is the figure.
    """

    name: str
    sums: np.ndarray
    value: Callable[[np.ndarray], np.ndarray] = ratio

    @classmethod
    def mean(cls, name: str, scores: Sequence[float | bool | None]) -> Measure:
        """Of the scores that are not None."""
        sums = np.array([(0.0, 0.0) if score is None else (float(score), 1.0) for score in scores]).reshape(-1, 2)
        return cls(name, sums)

    @property
    def figure(self) -> float:
        return float(self.value(self.sums.sum(axis=0)))

    @property
    def count(self) -> int:
        """Questions that have a part in it."""
        return int((self.sums != 0).any(axis=1).sum())


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


def resampled(
    totals: Sequence[np.ndarray],
    groups: Sequence[Hashable],
    of: Callable[..., np.ndarray],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> np.ndarray:
    """Values of a statistic under the bootstrap: [resamples].

    totals: arrays [n, k_i] over the same n questions (several for a comparison on the same questions)
    groups: [n] names; the questions of a group are drawn together, since they are not independent
    of: takes the summed arrays, each [b, k_i], to [b]
    """
    _, member = np.unique(np.array([str(group) for group in groups]), return_inverse=True)
    count = int(member.max()) + 1
    summed = []
    for total in totals:
        by_group = np.zeros((count, total.shape[1]))
        np.add.at(by_group, member, total)
        summed.append(by_group)
    rng = np.random.default_rng(seed)
    step = max(1, _NUMBERS // count)
    values = []
    for first in range(0, resamples, step):
        drawn = rng.integers(count, size=(min(step, resamples - first), count))
        weights = np.stack([np.bincount(row, minlength=count) for row in drawn]).astype(float)
        values.append(of(*(weights @ by_group for by_group in summed)))
    return np.concatenate(values)


def percentiles(values: np.ndarray, confidence: float = CONFIDENCE) -> Interval:
    """The middle part of the values that are numbers; nan to nan without any."""
    known = values[np.isfinite(values)]
    if not len(known):
        return Interval(float("nan"), float("nan"))
    low, high = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def interval(measure: Measure, groups: Sequence[Hashable], *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """The 95 % percentile interval of a figure."""
    return percentiles(resampled([measure.sums], groups, measure.value, seed=seed, resamples=resamples))


def difference(
    first: Measure, second: Measure, groups: Sequence[Hashable], *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, Interval]:
    """First minus second, both of the same questions, and its interval: paired, each draw is used for both."""

    def minus(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return first.value(a) - second.value(b)

    drawn = resampled([first.sums, second.sums], groups, minus, seed=seed, resamples=resamples)
    return first.figure - second.figure, percentiles(drawn)
