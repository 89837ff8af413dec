"""Which samples make an optimizer step, and how they are laid out over ranks.

The *set* of samples of step s depends on (seed, mixture, batch size) only. World size and memory only split it into
micro-batches, so a resumed or resized run neither skips nor repeats a sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from unimoe_ray.data.samples import Span

_GOLDEN = 0.6180339887498949
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


def step_samples(mixture: Mixture, steps: int, batch_size: int, seed: int) -> list[np.ndarray]:
    """Sample indices [batch_size] of each of ``steps`` steps.

    Counts per task follow the weights within one sample in every step (systematic sampling with a rotating offset).
    Each task is read in its own random order, through all of its samples before any comes again.
    """
    offsets = (seed * _GOLDEN + np.arange(steps) * _GOLDEN) % 1.0
    edges = np.concatenate([[0.0], np.cumsum(mixture.weights)])
    edges[-1] = 1.0
    below = np.ceil(edges[None, :] * batch_size - offsets[:, None]).astype(np.int64).clip(0, batch_size)
    counts = np.diff(below, axis=1)
    starts = np.concatenate([np.zeros((1, len(mixture.tasks)), np.int64), np.cumsum(counts, axis=0)[:-1]])
    columns = []
    for task, pool, start, count in zip(mixture.tasks, mixture.indices, starts.T, counts.T, strict=True):
        stream = _task_stream(task, pool, int(start[-1] + count[-1]), seed)
        columns.append([stream[s : s + c] for s, c in zip(start, count, strict=True)])
    return [np.concatenate([column[step] for column in columns]) for step in range(steps)]


def _task_stream(task: str, pool: np.ndarray, length: int, seed: int) -> np.ndarray:
    """Epoch after epoch of the pool, each in its own order."""
    name = int.from_bytes(hashlib.sha256(task.encode()).digest()[:8], "little")
    epochs = -(-length // len(pool))
    orders = [np.random.default_rng([seed, name, epoch]).permutation(pool) for epoch in range(epochs)]
    return np.concatenate(orders)[:length] if orders else pool[:0]


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
