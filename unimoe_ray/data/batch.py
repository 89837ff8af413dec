"""Micro-batches: collating prepared samples with their features, and the bytes in which they travel."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from safetensors.numpy import load, save

from unimoe_ray.config.model import IGNORE_INDEX, PLACEHOLDER_IDS
from unimoe_ray.data.layout import pack
from unimoe_ray.data.samples import PreparedSample
from unimoe_ray.data.store import StoredFeatures

Arrays = dict[str, np.ndarray]


def expand(ids: list[int], labels: list[int] | None, soft_tokens: list[int]) -> tuple[list[int], list[int]]:
    """Repeat each placeholder as often as its file has soft tokens; labels are -100 there and at the first token, which
    nothing predicts."""
    counts = iter(soft_tokens)
    out_ids: list[int] = []
    out_labels: list[int] = []
    for position, token in enumerate(ids):
        times = next(counts) if token < 0 else 1
        out_ids += [token] * times
        out_labels += [IGNORE_INDEX if labels is None or position == 0 else labels[position]] * times
    return out_ids, out_labels


def collate(
    samples: list[PreparedSample],
    features: Callable[[str], StoredFeatures],
    *,
    pad_left: bool = False,
    with_labels: bool = True,
    row_tokens: int = 0,
) -> Arrays:
    """Arrays of one micro-batch: input_ids, labels [B, S] int64, mask [B, S] bool, and per modality
    ``<modality>.values`` [windows, N, D] in the store's dtype, ``.lengths`` and ``.owner`` [windows] int64.

    ``features`` gives the stored features of a ``<kind>/<content key>``. No samples give one row of padding only.
    row_tokens: samples share rows of up to so many tokens (``layout.pack``); then there is ``positions`` [B, S] int64
    too, the place of each token in its sample, unless each has a row to itself after all.
    """
    rows = [[sample] for sample in samples]
    if row_tokens and samples:
        lengths = np.array([sample.length for sample in samples])
        rows = [[samples[index] for index in row] for row in pack(lengths, row_tokens)]
    expanded = [[expand(s.ids, s.labels if with_labels else None, s.soft_tokens) for s in row] for row in rows] or [[]]
    width = max(1, max(sum(len(ids) for ids, _ in row) for row in expanded))
    shape = len(expanded), width
    arrays: Arrays = {
        "input_ids": np.zeros(shape, np.int64),
        "labels": np.full(shape, IGNORE_INDEX, np.int64),
        "mask": np.zeros(shape, bool),
    }
    positions = np.tile(np.arange(width), (len(expanded), 1))
    for number, row in enumerate(expanded):
        start = width - sum(len(ids) for ids, _ in row) if pad_left else 0
        for ids, labels in row:
            if not ids:
                continue
            where = slice(start, start + len(ids))
            arrays["input_ids"][number, where] = ids
            arrays["labels"][number, where] = labels
            arrays["mask"][number, where] = True
            # What is behind the last sample, padding, goes on counting.
            positions[number, start:] -= positions[number, start]
            start += len(ids)
    if any(len(row) > 1 for row in rows):
        arrays["positions"] = positions
    files: dict[str, list[StoredFeatures]] = {}
    for row in rows:
        for sample in row:
            for name in sample.media:
                files.setdefault(name.split("/")[0], []).append(features(name))
    for modality in sorted(files, key=list(PLACEHOLDER_IDS).index):
        arrays |= stack_features(modality, files[modality])
    return arrays


def samples_in(arrays: Arrays) -> int:
    """How many samples a micro-batch has."""
    if "positions" in arrays:
        return int((arrays["mask"] & (arrays["positions"] == 0)).sum())
    return int(arrays["mask"].any(axis=1).sum())


def stack_features(modality: str, files: list[StoredFeatures]) -> Arrays:
    """The arrays of one modality in a micro-batch (see ``collate``)."""
    n = max(f.values.shape[1] for f in files)
    windows = sum(f.values.shape[0] for f in files)
    values = np.zeros((windows, n, files[0].values.shape[2]), files[0].values.dtype)
    owner = np.zeros(windows, np.int64)
    start = 0
    for index, file in enumerate(files):
        end = start + len(file.values)
        values[start:end, : file.values.shape[1]] = file.values
        owner[start:end] = index
        start = end
    lengths = np.concatenate([np.asarray(f.lengths, np.int64) for f in files])
    return {f"{modality}.values": values, f"{modality}.lengths": lengths, f"{modality}.owner": owner}


def to_bytes(arrays: Arrays) -> bytes:
    """safetensors: compact, checked on reading, no code in it."""
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def from_bytes(data: bytes) -> Arrays:
    return load(data)
