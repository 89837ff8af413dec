"""The feature store: features of frozen towers, encoded once, read many times.

``<root>/<modality>/<fingerprint>/block-*.arrow``, uncompressed Arrow files that readers map into memory. A row is one
media file: its key (content hash), its windows' token counts, and the values [windows, N, D] in the partition's dtype.
A block is visible only when complete, and never changed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from unimoe_ray.data.claims import claimed, is_alive, locked, owner
from unimoe_ray.errors import UnimoeError

DTYPES = {"fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("lengths", pa.list_(pa.int32())),
        ("shape", pa.list_(pa.int32())),
        ("values", pa.large_binary()),
    ]
)
_MENDED = ".mended"
_WRITE_ROWS = 32  # copied at a time on their way to the file


class DamagedBlock(UnimoeError):
    """A file of the store that is not what was written."""


@dataclass(frozen=True)
class StoredFeatures:
    """values [windows, N, D] fp16 or fp32 (a view of the mapped file); lengths [windows]: each window's tokens."""

    values: np.ndarray
    lengths: list[int]


def partition_dir(root: Path, modality: str, fingerprint: str, dtype: str = "fp16") -> Path:
    return root / modality / (fingerprint[:24] + ("" if dtype == "fp16" else f"-{dtype}"))


def write_block(folder: Path, keys: list[str], features: list[StoredFeatures], writer: str = "") -> Path:
    """One block, of the dtype of its features. The same keys give the same file name. ``writer``: the job, for its
    workers to tell its blocks from others'. Raises UnimoeError (disk full)."""
    folder.mkdir(parents=True, exist_ok=True)
    (dtype,) = {f.values.dtype for f in features}
    (name,) = (name for name, known in DTYPES.items() if known == dtype)
    schema = SCHEMA.with_metadata({"dtype": name, "writer": writer})
    block = hashlib.sha256("".join(keys).encode()).hexdigest()[:24]
    temporary = folder / f".{block}.{owner()}"
    try:
        with open(temporary, "wb") as sink:
            with pa.ipc.new_file(sink, schema) as file:
                for first in range(0, len(keys), _WRITE_ROWS):
                    rows = slice(first, first + _WRITE_ROWS)
                    file.write_batch(_record_batch(keys[rows], features[rows], schema))
            sink.flush()
            os.fsync(sink.fileno())
        path = folder / f"block-{block}.arrow"
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UnimoeError(f"{folder}: {error.strerror or error}") from None
    return path


def _record_batch(keys: list[str], features: list[StoredFeatures], schema: pa.Schema) -> pa.RecordBatch:
    ends = np.array([0, *(f.values.nbytes for f in features)]).cumsum()
    values = np.concatenate([f.values.ravel() for f in features])
    columns = [
        pa.array(keys, pa.string()),
        pa.array([f.lengths for f in features], pa.list_(pa.int32())),
        pa.array([list(f.values.shape) for f in features], pa.list_(pa.int32())),
        pa.Array.from_buffers(pa.large_binary(), len(keys), [None, pa.py_buffer(ends), pa.py_buffer(values)]),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def open_block(path: Path) -> pa.Table:
    """A block, mapped. Raises DamagedBlock, FileNotFoundError."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except pa.ArrowInvalid as error:
        raise DamagedBlock(f"{path}: damaged ({error}); 'unimoe prepare' encodes its media again") from None
    if not table.schema.equals(SCHEMA) or _dtype(table) is None:
        raise DamagedBlock(f"{path}: not a block of features; 'unimoe prepare' encodes its media again")
    return table


def _dtype(table: pa.Table) -> np.dtype | None:
    """Blocks that say none are of a time when there was fp16 only."""
    return DTYPES.get((table.schema.metadata or {}).get(b"dtype", b"fp16").decode())


def blocks(folder: Path) -> list[Path]:
    return sorted(folder.glob("block-*.arrow"))


def stored_lengths(paths: list[Path]) -> Iterator[tuple[str, list[int]]]:
    """Key and window lengths of everything in these blocks, which are mapped one at a time."""
    for path in paths:
        table = open_block(path)
        yield from zip(table["key"].to_pylist(), table["lengths"].to_pylist(), strict=True)


def mend(folder: Path, say: Callable[[str], None]) -> None:
    """Remove what is of no use: damaged blocks, with a line about each, and what dead writers left."""
    with locked(folder) as now:
        claimed(folder, now)
        for path in folder.glob(".*.*"):
            who = path.name.rpartition(".")[2]
            claim = folder / ".claims" / who
            if not (is_alive(who, path, now) or is_alive(who, claim, now)):
                path.unlink(missing_ok=True)
        for path in blocks(folder):
            try:
                open_block(path)
            except DamagedBlock as error:
                say(str(error))
                (folder / _MENDED).touch()
                path.unlink()


def mended(folder: Path) -> int:
    """A number that changes when ``mend`` has removed a block. -1: the folder is not there or needs to be mended."""
    if not folder.is_dir():
        return -1
    try:
        for path in blocks(folder):
            open_block(path)
    except DamagedBlock:
        return -1
    mark = folder / _MENDED
    return mark.stat().st_mtime_ns if mark.exists() else 0


class FeatureStore:
    """Random access to one partition. Opening reads the keys only. Raises DamagedBlock."""

    def __init__(self, folder: Path):
        self._parts: list[tuple[pa.RecordBatch, np.dtype]] = []
        self._where: dict[str, tuple[int, int]] = {}
        for path in blocks(folder):
            table = open_block(path)
            for part in table.to_batches():
                for row, key in enumerate(part["key"].to_pylist()):
                    self._where.setdefault(key, (len(self._parts), row))
                self._parts.append((part, _dtype(table)))

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def __len__(self) -> int:
        return len(self._where)

    def lengths(self, key: str) -> list[int]:
        number, row = self._where[key]
        return self._parts[number][0]["lengths"][row].as_py()

    def get(self, key: str) -> StoredFeatures:
        """Raises KeyError for a file that was not encoded."""
        number, row = self._where[key]
        part, dtype = self._parts[number]
        shape = part["shape"][row].as_py()
        values = np.frombuffer(part["values"][row].as_buffer(), dtype=dtype).reshape(shape)
        return StoredFeatures(values, part["lengths"][row].as_py())
