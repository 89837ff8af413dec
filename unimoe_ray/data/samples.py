"""The prepared samples of one split: tokenised conversations and the keys of their media, in one mapped Arrow file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from unimoe_ray.data.columns import Column, Rows

if TYPE_CHECKING:
    from unimoe_ray.data.stream import Stream

# What a batch of the file holds at most: some tens of megabytes while it is made.
BATCH_ROWS, BATCH_TOKENS = 8_192, 2**20
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
    """Where prepared samples and features lie. ``partitions`` maps a modality to its folder in the store; ``stream``
    makes the features where the store has none."""

    samples: str
    partitions: dict[str, str]
    spans: tuple[Span, ...] = ()
    stream: Stream | None = None


class SampleWriter:
    """One Arrow file of prepared samples; a context manager: the file is visible once it is left without an error.
    A bounded number of samples is held in memory."""

    def __init__(self, path: Path):
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}")
        self._names: dict[str, dict[str, int]] = {f.name: {} for f in SCHEMA if pa.types.is_dictionary(f.type)}
        self._part: list[PreparedSample] = []
        self._tokens = 0

    def __enter__(self) -> SampleWriter:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._sink = pa.OSFile(str(self._temporary), "wb")
        # A later batch may bring new names of tasks and groups: they are added behind those that are known.
        options = pa.ipc.IpcWriteOptions(emit_dictionary_deltas=True)
        self._writer = pa.ipc.new_file(self._sink, SCHEMA, options=options)
        self._batches = 0
        return self

    def add(self, sample: PreparedSample) -> None:
        self._part.append(sample)
        self._tokens += len(sample.ids)
        if len(self._part) == BATCH_ROWS or self._tokens >= BATCH_TOKENS:
            self._flush()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and (self._part or not self._batches):
            self._flush()
        self._writer.close()
        self._sink.close()
        if kind is None:
            self._temporary.replace(self._path)
        else:
            self._temporary.unlink()

    def _flush(self) -> None:
        self._writer.write_batch(_batch(self._part, self._names))
        self._batches += 1
        self._part, self._tokens = [], 0


def write_samples(path: Path, samples: Iterable[PreparedSample]) -> None:
    """One Arrow file, visible only when complete."""
    with SampleWriter(path) as writer:
        for sample in samples:
            writer.add(sample)


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
    """Random access to prepared samples by row number; the file is mapped, not read. Memory: of the rows asked for.

    lengths: spliced tokens of each row; groups: the index in ``group_names`` of each row's modality group
    """

    def __init__(self, path: Path):
        self._batches = pa.ipc.open_file(pa.memory_map(str(path))).read_all().to_batches()
        self._starts = np.cumsum([0, *map(len, self._batches)])
        self.lengths = Column([batch["length"].to_numpy() for batch in self._batches], np.int64)
        self.groups, self.group_names = self._codes("group")
        self._tasks, self._task_names = self._codes("task")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def by_task(self) -> dict[str, Rows]:
        """Row numbers of each task."""
        return {task: self._tasks.rows_of(code) for code, task in enumerate(self._task_names)}

    def get(self, row: int) -> PreparedSample:
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        values = self._batches[batch].slice(row - int(self._starts[batch]), 1).to_pylist()[0]
        values.pop("length")
        return PreparedSample(**values)

    def _codes(self, name: str) -> tuple[Column, list[str]]:
        """``SampleWriter`` only ever adds names, so a code means the same in every batch."""
        columns = [batch[name] for batch in self._batches]
        names = columns[-1].dictionary.to_pylist() if columns else []
        return Column([column.indices.to_numpy() for column in columns], np.int64), names
