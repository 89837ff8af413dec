"""The prepared samples of one split: tokenised conversations and the keys of their media, in one mapped Arrow file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

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
class Source:
    """Where prepared samples and features lie. ``partitions`` maps a modality to its folder in the store."""

    samples: str
    partitions: dict[str, str]


def write_samples(path: Path, samples: list[PreparedSample]) -> None:
    columns = {name: [getattr(s, name) for s in samples] for name in SCHEMA.names}
    arrays = [pa.array(columns[field.name], field.type) for field in SCHEMA]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA))
    temporary.replace(path)


class SampleTable:
    """Random access to prepared samples by row number."""

    def __init__(self, path: Path):
        self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all().combine_chunks()
        self.lengths = self._table["length"].to_numpy()
        column = self._table["group"].combine_chunks()
        self.groups, self.group_names = np.asarray(column.indices), column.dictionary.to_pylist()

    def __len__(self) -> int:
        return len(self._table)

    def by_task(self) -> dict[str, np.ndarray]:
        """Row numbers of each task."""
        column = self._table["task"].combine_chunks()
        codes = np.asarray(column.indices)
        return {task: np.flatnonzero(codes == code) for code, task in enumerate(column.dictionary.to_pylist())}

    def get(self, row: int) -> PreparedSample:
        values = self._table.slice(row, 1).to_pylist()[0]
        values.pop("length")
        return PreparedSample(**values)
