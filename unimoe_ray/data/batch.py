"""Micro-batches: collating prepared samples with their features, and the bytes in which they travel."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from safetensors.numpy import load, save

from unimoe_ray.config.model import IGNORE_INDEX, PLACEHOLDER_IDS
from unimoe_ray.data.samples import PreparedSample
from unimoe_ray.data.store import StoredFeatures

Arrays = dict[str, np.ndarray]


def expand(ids: list[int], labels: list[int] | None, soft_tokens: list[int]) -> tuple[list[int], list[int]]:
    """Repeat each placeholder as often as its file has soft tokens; labels are -100 there."""
    counts = iter(soft_tokens)
    out_ids: list[int] = []
    out_labels: list[int] = []
    for position, token in enumerate(ids):
        times = next(counts) if token < 0 else 1
        out_ids += [token] * times
        out_labels += [IGNORE_INDEX if labels is None else labels[position]] * times
    return out_ids, out_labels


def collate(
    samples: list[PreparedSample],
    features: Callable[[str], StoredFeatures],
    *,
    pad_left: bool = False,
    with_labels: bool = True,
) -> Arrays:
    """Arrays of one micro-batch: input_ids, labels [B, S] int64, mask [B, S] bool, and per modality
    ``<modality>.values`` [windows, N, D] in the store's dtype, ``.lengths`` and ``.owner`` [windows] int64.

    ``features`` gives the stored features of a ``<kind>/<content key>``. No samples give one row of padding only.
    """
    rows = [expand(s.ids, s.labels if with_labels else None, s.soft_tokens) for s in samples] or [([], [])]
    width = max(1, max(len(ids) for ids, _ in rows))
    arrays: Arrays = {
        "input_ids": np.zeros((len(rows), width), np.int64),
        "labels": np.full((len(rows), width), IGNORE_INDEX, np.int64),
        "mask": np.zeros((len(rows), width), bool),
    }
    for row, (ids, labels) in enumerate(rows):
        where = slice(width - len(ids), width) if pad_left else slice(0, len(ids))
        arrays["input_ids"][row, where] = ids
        arrays["labels"][row, where] = labels
        arrays["mask"][row, where] = True
    files: dict[str, list[StoredFeatures]] = {}
    for sample in samples:
        for name in sample.media:
            files.setdefault(name.split("/")[0], []).append(features(name))
    for modality in sorted(files, key=list(PLACEHOLDER_IDS).index):
        arrays |= stack_features(modality, files[modality])
    return arrays


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
