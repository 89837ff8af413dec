"""Which samples make an optimizer step, and how they are laid out over ranks.

The *set* of samples of step s depends on (seed, mixture, batch size) only. World size and memory only split it into
micro-batches, so a resumed or resized run neither skips nor repeats a sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from unimoe_ray.data.order import stream
from unimoe_ray.data.samples import SampleTable, Span

# A turn, and the golden part of one: a float's exact value.
_UNIT = 2**64
_GOLDEN = int(0.6180339887498949 * _UNIT)
# A micro-batch with more padding is divided: short samples before long ones. A micro-batch more costs as much time as
# about this many tokens (measured on the mini model), so less padding than that is left alone.
MAX_PADDING = 0.15
MIN_PADDING = 64


@dataclass(frozen=True)
class Mixture:
    """Weights of tasks, and each task's sample indices in the table; a task whose samples are of sources with
    different weights is one part for each of them."""

    tasks: tuple[str, ...]
    weights: np.ndarray
    indices: tuple[np.ndarray, ...]

    @classmethod
    def build(cls, weights: dict[str, float], indices: dict[str, np.ndarray], spans: Sequence[Span] = ()) -> Mixture:
        """weights, indices: by task. Within a task, a sample of a source of weight 2 comes twice as often as one of a
        source of weight 1."""
        parts = [part for t in sorted(weights) for part in _by_source(t, weights[t], np.asarray(indices[t]), spans)]
        names, shares, rows = zip(*parts, strict=True)
        w = np.array(shares, dtype=np.float64)
        return cls(names, w / w.sum(), rows)


def _by_source(
    task: str, weight: float, rows: np.ndarray, spans: Sequence[Span]
) -> Iterator[tuple[str, float, np.ndarray]]:
    source = np.searchsorted([span.first for span in spans], rows, side="right") - 1
    parts = np.unique(source)
    if len({spans[part].weight for part in parts if spans}) < 2:
        yield task, weight, rows
        return
    masses = np.array([spans[part].weight for part in parts]) * [np.count_nonzero(source == part) for part in parts]
    for part, share in zip(parts, masses / masses.sum(), strict=True):
        yield f"{task}@{part}", weight * share, rows[source == part]


@dataclass(frozen=True)
class Order:
    """What decides the samples of every step of a run. ``tasks``: pairs of name and mixture weight."""

    tasks: tuple[tuple[str, float], ...]
    steps: int
    batch_size: int
    seed: int

    def plan(self, table: SampleTable, spans: Sequence[Span] = ()) -> Plan:
        """Raises KeyError for a task that the table lacks."""
        pools = table.by_task()
        mixture = Mixture.build(dict(self.tasks), {task: pools[task] for task, _ in self.tasks}, spans)
        return Plan(mixture, self.steps, self.batch_size, self.seed)


@dataclass(frozen=True)
class Plan:
    """The samples of every step. Each is computed by itself: its cost does not depend on the steps before it, and only
    by a logarithm on their number."""

    mixture: Mixture
    steps: int
    batch_size: int
    seed: int

    def samples(self, step: int) -> np.ndarray:
        """Sample indices [batch_size] of a step.

        Counts per task follow the weights within one sample in every step (systematic sampling with a rotating offset).
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


def split_step(
    samples: np.ndarray, lengths: np.ndarray, groups: np.ndarray, world: int, max_tokens: int
) -> list[list[np.ndarray]]:
    """Micro-batches of each rank: [rank][micro] sample indices, equally many on every rank.

    samples [B] indices; lengths [B] spliced tokens; groups [B] modality group numbers. A micro-batch has one modality
    group, little padding and at most ``max_tokens`` padded tokens; ranks get about equal numbers of tokens. A rank for
    which no sample is left gets empty micro-batches.
    """
    order = np.lexsort((samples, lengths, groups))
    samples, lengths, groups = samples[order], lengths[order], groups[order]
    middle = np.cumsum(lengths) - lengths / 2
    rank_of = np.minimum((middle * world / lengths.sum()).astype(np.int64), world - 1)
    ranks: list[list[np.ndarray]] = []
    for rank in range(world):
        mine = rank_of == rank
        ranks.append(_micro_batches(samples[mine], lengths[mine], groups[mine], max_tokens))
    most = max(len(micros) for micros in ranks)
    for micros in ranks:
        while len(micros) < most:
            largest = max(range(len(micros)), key=lambda i: len(micros[i]), default=None)
            if largest is None or len(micros[largest]) < 2:
                micros.append(samples[:0])
            else:
                half = len(micros[largest]) // 2
                micros[largest : largest + 1] = [micros[largest][:half], micros[largest][half:]]
    return ranks


def _micro_batches(samples: np.ndarray, lengths: np.ndarray, groups: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    micros: list[list[int]] = []
    group, filled = None, 0
    for sample, length, sample_group in zip(samples, lengths, groups, strict=True):
        # Sorted by length, so the newest sample is the longest and sets the padded size.
        padded = (len(micros[-1]) + 1) * length if micros else 0
        padding = padded - filled - length
        too_loose = padding > max(MIN_PADDING, MAX_PADDING * padded)
        if sample_group != group or padded > max_tokens or too_loose:
            micros.append([])
            group, filled = sample_group, 0
        micros[-1].append(sample)
        filled += length
    return [np.array(micro, dtype=np.int64) for micro in micros]
