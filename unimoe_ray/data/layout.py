"""How the samples of a step are laid out over ranks and in micro-batches."""

from __future__ import annotations

from heapq import heapreplace

import numpy as np

# A micro-batch with more padding is divided: short samples before long ones. A micro-batch more costs as much time as
# about this many tokens (measured on the mini model), so less padding than that is left alone.
MAX_PADDING = 0.15
MIN_PADDING = 64


def split_step(
    samples: np.ndarray, lengths: np.ndarray, groups: np.ndarray, world: int, max_tokens: int, row_tokens: int = 0
) -> list[list[np.ndarray]]:
    """Micro-batches of each rank: [rank][micro] sample indices, equally many on every rank.

    samples [B] indices; lengths [B] spliced tokens; groups [B] modality group numbers; row_tokens: see ``pack``, 0:
    each sample has a row of its own. A micro-batch has one modality group, little padding and, unless it is one sample,
    at most ``max_tokens`` padded tokens. A rank's tokens differ from the mean by at most the longest sample; one for
    which no sample is left gets empty micro-batches.
    """
    order = np.lexsort((samples, lengths, groups))
    samples, lengths, groups = samples[order], lengths[order], groups[order]
    middle = np.cumsum(lengths) - lengths / 2
    rank_of = np.minimum((middle * world / lengths.sum()).astype(np.int64), world - 1)
    ranks: list[list[np.ndarray]] = []
    for rank in range(world):
        mine = rank_of == rank
        if row_tokens:
            ranks.append(_packed_micro_batches(samples[mine], lengths[mine], groups[mine], max_tokens, row_tokens))
        else:
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


def pack(lengths: np.ndarray, row_tokens: int) -> list[np.ndarray]:
    """Rows of samples of about equal sums of lengths, as few as have at most ``row_tokens`` each, or as many tokens as
    the longest sample: indices into lengths [B], in ascending order.

    The longest sample first, each to the row with the least (Graham, 1969).
    """
    count = -(-int(lengths.sum()) // row_tokens)
    limit = max(row_tokens, int(lengths.max(initial=0)))
    while True:
        heap = [(0, row) for row in range(count)]
        row_of = np.zeros(len(lengths), np.int64)
        for index in np.argsort(-lengths, kind="stable").tolist():
            filled, row_of[index] = heap[0]
            heapreplace(heap, (filled + int(lengths[index]), int(row_of[index])))
        if max(heap, default=(0, 0))[0] <= limit:
            return [np.flatnonzero(row_of == row) for row in range(count)]
        count += 1


def padded_tokens(lengths: np.ndarray, row_tokens: int = 0) -> int:
    """What a micro-batch of these lengths has, padding included."""
    if row_tokens:
        rows = pack(lengths, row_tokens)
        return len(rows) * max((int(lengths[row].sum()) for row in rows), default=0)
    return len(lengths) * int(lengths.max(initial=0))


def _packed_micro_batches(
    samples: np.ndarray, lengths: np.ndarray, groups: np.ndarray, max_tokens: int, row_tokens: int
) -> list[np.ndarray]:
    """As few of each group as fit, each with samples of all lengths."""
    micros = []
    for group in np.unique(groups):
        mine = groups == group
        count = -(-int(lengths[mine].sum()) // max_tokens)
        while any(
            len(part) > 1 and padded_tokens(part, row_tokens) > max_tokens for part in _dealt(lengths[mine], count)
        ):
            count += 1
        micros += _dealt(samples[mine], count)
    return micros


def _dealt(values: np.ndarray, count: int) -> list[np.ndarray]:
    return [values[first::count] for first in range(count)]


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
