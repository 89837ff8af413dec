"""Which samples make an optimizer step.

The *set* of samples of step s depends on (seed, mixture, batch size) only. World size and memory only split it into
micro-batches (``layout``), so a resumed or resized run neither skips nor repeats a sample.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from unimoe_ray.data.order import stream
from unimoe_ray.data.samples import SampleTable, Span

# A turn, and the golden part of one: a float's exact value.
_UNIT = 2**64
_GOLDEN = int(0.6180339887498949 * _UNIT)


class Pool(Protocol):
    """Sample indices by place: an array, or ``columns.Rows``."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: Any) -> Any: ...


@dataclass(frozen=True)
class Order:
    """What decides the samples of every step of a run.

    tasks: pairs of name and mixture weight
    steps, epochs: one of them. Of so many steps, each has the mixture's shares of the tasks. Of so many epochs, each
        has every sample of the tasks as often as its task's weight (times its source's), a whole number, says
    temperature T: shares are weight * size ** (1 / T); None: the weights alone
    """

    tasks: tuple[tuple[str, float], ...]
    batch_size: int
    seed: int
    steps: int | None = None
    epochs: int | None = None
    temperature: float | None = None

    def plan(self, table: SampleTable, spans: Sequence[Span] = ()) -> Plan:
        """Raises KeyError for a task that the table lacks."""
        pools = table.by_task()
        weights, pools = dict(self.tasks), {task: pools[task] for task, _ in self.tasks}
        if self.epochs is not None:
            return EpochPlan(Joined.build(weights, pools, spans), self.epochs, self.batch_size, self.seed)
        mixture = Mixture.build(weights, pools, spans, self.temperature)
        return MixturePlan(mixture, self.steps, self.batch_size, self.seed)


@dataclass(frozen=True)
class Mixture:
    """Shares of tasks, and each task's sample indices in the table; a task whose samples are of sources with
    different weights is one part for each of them."""

    tasks: tuple[str, ...]
    weights: np.ndarray
    indices: tuple[Pool, ...]

    @classmethod
    def build(
        cls,
        weights: dict[str, float],
        indices: dict[str, Pool],
        spans: Sequence[Span] = (),
        temperature: float | None = None,
    ) -> Mixture:
        """weights, indices: by task. Within a task, a sample of a source of weight 2 comes twice as often as one of a
        source of weight 1."""
        names, shares, pools = [], [], []
        for task in sorted(weights):
            parts = _by_source(task, indices[task], spans)
            masses = np.array([weight * len(pool) for _, weight, pool in parts], np.float64)
            share = weights[task] * (1.0 if temperature is None else len(indices[task]) ** (1 / temperature))
            names += [name for name, _, _ in parts]
            shares += [share * part for part in masses / masses.sum()]
            pools += [pool for _, _, pool in parts]
        w = np.array(shares, dtype=np.float64)
        return cls(tuple(names), w / w.sum(), tuple(pools))


def _by_source(task: str, pool: Pool, spans: Sequence[Span]) -> list[tuple[str, float, Pool]]:
    """Name, weight and sample indices of each part of a task: one, unless its sources have different weights."""
    if len({span.weight for span in spans}) < 2:
        return [(task, spans[0].weight if spans else 1.0, pool)]
    edges = [0, *(bisect_left(pool, span.first) for span in spans[1:]), len(pool)]
    parts = [
        (f"{task}@{number}", span.weight, pool[start:stop])
        for number, (span, start, stop) in enumerate(zip(spans, edges, edges[1:], strict=False))
        if stop > start
    ]
    if len({weight for _, weight, _ in parts}) < 2:
        return [(task, parts[0][1], pool)]
    return parts


@dataclass(frozen=True)
class MixturePlan:
    """A budget of steps. Each is computed by itself: its cost does not depend on the steps before it, and only by a
    logarithm on their number."""

    mixture: Mixture
    steps: int
    batch_size: int
    seed: int

    def samples(self, step: int) -> np.ndarray:
        """Sample indices [batch_size] of a step.

        Counts per task follow the shares within one sample in every step (systematic sampling with a rotating offset).
        Each task is read in its own random order, through all of its samples before any comes again.
        """
        begin, end = self._drawn(step), self._drawn(step + 1)
        columns = [
            pool[stream(task, len(pool), start, stop, self.seed)]
            for task, pool, start, stop in zip(self.mixture.tasks, self.mixture.indices, begin, end, strict=True)
        ]
        return np.concatenate(columns)

    def _drawn(self, step: int) -> list[int]:
        """How many samples of each task the steps before this one have.

        In step s, those of the first j tasks are ceil(edge_j * batch_size - u_s), u_s the fractional part of
        (seed + s) golden ratios. In whole numbers of 2**-64 the sum over steps is exact and has a closed form.
        """
        edges = np.concatenate([[0.0], np.cumsum(self.mixture.weights)])
        edges[-1] = 1.0
        turns = floor_sum(step, _UNIT, _GOLDEN, self.seed * _GOLDEN)
        below = [
            turns + floor_sum(step, _UNIT, -_GOLDEN, int(edge * _UNIT) + _UNIT - 1 - self.seed * _GOLDEN)
            for edge in (edges * self.batch_size).tolist()
        ]
        return [upper - lower for lower, upper in zip(below, below[1:], strict=False)]


@dataclass(frozen=True)
class EpochPlan:
    """A budget of epochs, each in a random order of its own over all that is in the pool. An epoch's last step has what
    is left of it."""

    pool: Pool
    epochs: int
    batch_size: int
    seed: int

    @property
    def steps(self) -> int:
        return self.epochs * self._steps_of_one

    def samples(self, step: int) -> np.ndarray:
        """Sample indices of a step: [batch_size], or fewer at the end of an epoch."""
        epoch, within = divmod(step, self._steps_of_one)
        start, size = within * self.batch_size, len(self.pool)
        stop = min(start + self.batch_size, size)
        return self.pool[stream("epoch", size, epoch * size + start, epoch * size + stop, self.seed)]

    @property
    def _steps_of_one(self) -> int:
        return -(-len(self.pool) // self.batch_size)


Plan = MixturePlan | EpochPlan


class Joined:
    """Pools one after the other."""

    def __init__(self, pools: Sequence[Pool]):
        self._pools, self._starts = pools, np.cumsum([0, *map(len, pools)])

    @classmethod
    def build(cls, weights: dict[str, float], indices: dict[str, Pool], spans: Sequence[Span] = ()) -> Joined:
        """Each sample as often as its task's and its source's weights, whole numbers, say."""
        parts = [(weights[task], part) for task in sorted(weights) for part in _by_source(task, indices[task], spans)]
        return cls([pool for weight, (_, of_source, pool) in parts for _ in range(round(weight * of_source))])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        samples = np.empty(places.shape, np.int64)
        pool_of = np.searchsorted(self._starts, places, side="right") - 1
        for number in np.unique(pool_of):
            here = pool_of == number
            samples[here] = self._pools[number][places[here] - self._starts[number]]
        return samples


def floor_sum(n: int, m: int, a: int, b: int) -> int:
    """The sum of floor((a * i + b) / m) over i in range(n), in O(log m) operations on whole numbers (Euclid's algorithm
    on the slope; Graham, Knuth, Patashnik: "Concrete Mathematics", section 3.5)."""
    total = 0
    while n > 0:
        (steep, a), (high, b) = divmod(a, m), divmod(b, m)
        total += n * (n - 1) // 2 * steep + n * high
        # What is left counts points under a line of slope below 1: the same ones, column by column, seen from its side.
        top = a * n + b
        n, b = divmod(top, m)
        m, a = a, m
    return total
