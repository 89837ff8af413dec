"""Performance bias: how much a model that was trained on everything falls behind the specialist of each modality.

Uni-MoE argues with this (section 4.4 of arXiv 2405.11273) but gives no formula. Here, for each modality m with the same
questions answered by both,

    drop_m = score of m's specialist on m - score of the model on m

and of all m the mean, the worst (largest) drop, and the spread (standard deviation over modalities, of the population).
A drop below 0 is a gain. A model with a small mean and a large spread pays for one modality with another.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from unimoe_ray.evaluation.intervals import RESAMPLES, Interval, Measure, percentiles, resampled


@dataclass(frozen=True)
class Compared:
    """One modality: the same measure of the specialist and of the model, on the same questions, which ``groups`` puts
    together where they are not independent."""

    specialist: Measure
    model: Measure
    groups: Sequence[Hashable]


@dataclass(frozen=True)
class Bias:
    """drops: by modality; intervals: of each drop, by modality, and of ``mean``, ``worst`` and ``spread``."""

    drops: dict[str, float]
    mean: float
    worst: float
    worst_modality: str
    spread: float
    intervals: dict[str, Interval]


def performance_bias(modalities: Mapping[str, Compared], *, seed: int = 0, resamples: int = RESAMPLES) -> Bias:
    """See the module. The questions of each modality are drawn anew for every interval, those of one draw for both
    models. Raises ValueError without modalities, or where the two did not answer the same number of questions."""
    if not modalities:
        raise ValueError("no modalities to compare")
    for name, pair in modalities.items():
        if not len(pair.specialist.sums) == len(pair.model.sums) == len(pair.groups):
            raise ValueError(f"{name}: the specialist and the model did not answer the same questions")
    drops = {name: pair.specialist.figure - pair.model.figure for name, pair in modalities.items()}
    drawn = np.stack([_drawn_drops(pair, seed + i, resamples) for i, pair in enumerate(modalities.values())])
    intervals = {name: percentiles(row) for name, row in zip(modalities, drawn, strict=True)}
    intervals |= {
        "mean": percentiles(drawn.mean(axis=0)),
        "worst": percentiles(drawn.max(axis=0)),
        "spread": percentiles(drawn.std(axis=0)),
    }
    values = np.array(list(drops.values()))
    worst = max(drops, key=drops.__getitem__)
    return Bias(drops, float(values.mean()), drops[worst], worst, float(values.std()), intervals)


def _drawn_drops(pair: Compared, seed: int, resamples: int) -> np.ndarray:
    def drop(specialist: np.ndarray, model: np.ndarray) -> np.ndarray:
        return pair.specialist.value(specialist) - pair.model.value(model)

    return resampled([pair.specialist.sums, pair.model.sums], pair.groups, drop, seed=seed, resamples=resamples)
