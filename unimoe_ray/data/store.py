"""The feature store: features of frozen towers, encoded once, read many times.

``<root>/<modality>/<fingerprint>/block-*.arrow``, uncompressed Arrow files that readers map into memory. A row is one
media file: its key (content hash), its windows' token counts, and the values as fp16 [windows, N, D].
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from unimoe_ray.errors import UnimoeError

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("lengths", pa.list_(pa.int32())),
        ("shape", pa.list_(pa.int32())),
        ("values", pa.large_binary()),
    ]
)


@dataclass(frozen=True)
class StoredFeatures:
    """values [windows, N, D] fp16 (a view of the mapped file); lengths [windows]: valid tokens of each window."""

    values: np.ndarray
    lengths: list[int]


def partition_dir(root: Path, modality: str, fingerprint: str) -> Path:
    return root / modality / fingerprint[:24]


def write_block(folder: Path, keys: list[str], features: list[StoredFeatures]) -> Path:
    """One block, visible only when complete. The same keys give the same file name. Raises UnimoeError (disk full)."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pydict(
        {
            "key": keys,
            "lengths": [f.lengths for f in features],
            "shape": [list(f.values.shape) for f in features],
            "values": [np.ascontiguousarray(f.values, dtype=np.float16).tobytes() for f in features],
        },
        schema=SCHEMA,
    )
    name = hashlib.sha256("".join(keys).encode()).hexdigest()[:24]
    temporary = folder / f".{name}.{os.getpid()}"
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            writer.write_table(table)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UnimoeError(f"{folder}: {error}") from None
    path = folder / f"block-{name}.arrow"
    temporary.replace(path)
    return path


class FeatureStore:
    """Random access to one partition. Opening reads the keys only."""

    def __init__(self, folder: Path):
        self._tables: list[pa.Table] = []
        self._where: dict[str, tuple[int, int]] = {}
        for path in sorted(folder.glob("block-*.arrow")):
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            for row, key in enumerate(table["key"].to_pylist()):
                self._where.setdefault(key, (len(self._tables), row))
            self._tables.append(table)

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def __len__(self) -> int:
        return len(self._where)

    def lengths(self, key: str) -> list[int]:
        block, row = self._where[key]
        return self._tables[block]["lengths"][row].as_py()

    def get(self, key: str) -> StoredFeatures:
        """Raises KeyError for a file that was not encoded."""
        block, row = self._where[key]
        table = self._tables[block]
        shape = table["shape"][row].as_py()
        values = np.frombuffer(table["values"][row].as_buffer(), dtype=np.float16).reshape(shape)
        return StoredFeatures(values, table["lengths"][row].as_py())
