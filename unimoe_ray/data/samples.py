"""The prepared samples of one split: tokenised conversations and the keys of their media, in one mapped Arrow file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

# What a batch of the file holds at most: a hundred megabytes or two while it is made.
BATCH_ROWS, BATCH_TOKENS = 65_536, 2**22
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("task", pa.dictionary(pa.int32(), pa.string())),
        ("group", pa.dictionary(pa.int32(), pa.string())),
        ("ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("media", pa.list_(pa.string())),
        ("soft_tokens", pa.list_(pa.int32())),
        ("length", pa.int32()),
    ]
)


@dataclass(frozen=True)
class PreparedSample:
    """ids: text ids with one placeholder id per media file; media: ``<kind>/<content key>`` of each, in order;
    soft_tokens: how many soft tokens each becomes; length: spliced length in tokens."""

    id: str
    task: str
    group: str
    ids: list[int]
    labels: list[int]
    media: list[str]
    soft_tokens: list[int]

    @property
    def length(self) -> int:
        return len(self.ids) + sum(self.soft_tokens) - len(self.media)


@dataclass(frozen=True)
class Span:
    """Rows from ``first`` on, up to the next span, are of one of ``data.sources``, with its weight."""

    first: int
    weight: float


@dataclass(frozen=True)
class Source:
    """Where prepared samples and features lie. ``partitions`` maps a modality to its folder in the store."""

    samples: str
    partitions: dict[str, str]
    spans: tuple[Span, ...] = ()


def write_samples(path: Path, samples: Iterable[PreparedSample]) -> None:
    """One Arrow file, visible only when complete; a bounded number of samples is held in memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    # A later batch may bring new names of tasks and groups: they are added behind those that are known.
    options = pa.ipc.IpcWriteOptions(emit_dictionary_deltas=True)
    names: dict[str, dict[str, int]] = {field.name: {} for field in SCHEMA if pa.types.is_dictionary(field.type)}
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, SCHEMA, options=options) as writer:
        written = False
        for part in _parts(samples):
            writer.write_batch(_batch(part, names))
            written = True
        if not written:
            writer.write_batch(_batch([], names))
    temporary.replace(path)


def _parts(samples: Iterable[PreparedSample]) -> Iterator[list[PreparedSample]]:
    part, tokens = [], 0
    for sample in samples:
        part.append(sample)
        tokens += len(sample.ids)
        if len(part) == BATCH_ROWS or tokens >= BATCH_TOKENS:
            yield part
            part, tokens = [], 0
    if part:
        yield part


def _batch(samples: list[PreparedSample], names: dict[str, dict[str, int]]) -> pa.RecordBatch:
    arrays = []
    for field in SCHEMA:
        values = [getattr(sample, field.name) for sample in samples]
        if field.name in names:
            known = names[field.name]
            codes = pa.array([known.setdefault(value, len(known)) for value in values], field.type.index_type)
            arrays.append(pa.DictionaryArray.from_arrays(codes, pa.array(list(known), field.type.value_type)))
        else:
            arrays.append(pa.array(values, field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


class SampleTable:
    """Random access to prepared samples by row number; the file is mapped, not read."""

    def __init__(self, path: Path):
        self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self.lengths = self._table["length"].to_numpy()
        self.groups = np.asarray(self._column("group").indices)

    def __len__(self) -> int:
        return len(self._table)

    def by_task(self) -> dict[str, np.ndarray]:
        """Row numbers of each task."""
        column = self._column("task")
        codes = np.asarray(column.indices)
        return {task: np.flatnonzero(codes == code) for code, task in enumerate(column.dictionary.to_pylist())}

    def get(self, row: int) -> PreparedSample:
        values = self._table.slice(row, 1).to_pylist()[0]
        values.pop("length")
        return PreparedSample(**values)

    def _column(self, name: str) -> pa.DictionaryArray:
        return self._table[name].unify_dictionaries().combine_chunks()
