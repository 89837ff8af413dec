"""Messages between two processes over a pipe: a JSON header, then arrays as they lie in memory."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

MAX_HEADER, MAX_ARRAYS = 16 << 20, 1 << 30
DTYPES = ("float32", "int64")


def write_frame(stream: BinaryIO, header: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
    arrays = [np.ascontiguousarray(array) for array in arrays]
    about = [[array.dtype.name, list(array.shape)] for array in arrays]
    text = json.dumps({"header": header, "arrays": about}).encode()
    stream.write(struct.pack("<I", len(text)) + text)
    for array in arrays:
        stream.write(array.data.cast("B") if array.size else b"")
    stream.flush()


def read_frame(stream: BinaryIO) -> tuple[dict[str, Any], list[np.ndarray]] | None:
    """None at the end. Raises ValueError for what is no message: nothing larger than the limits is ever allocated."""
    begin = stream.read(4)
    if not begin:
        return None
    (length,) = struct.unpack("<I", begin.ljust(4, b"\xff"))
    if length > MAX_HEADER:
        raise ValueError(f"a header of {length} bytes; allowed: {MAX_HEADER}")
    about = json.loads(_exactly(stream, length))
    arrays, total = [], 0
    for dtype, shape in about["arrays"]:
        if dtype not in DTYPES or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError(f"an array {dtype} {shape}")
        size = np.dtype(dtype).itemsize
        for n in shape:
            size *= n
        total += size
        if total > MAX_ARRAYS:
            raise ValueError(f"arrays of {total} bytes; allowed: {MAX_ARRAYS}")
        arrays.append(np.frombuffer(_exactly(stream, size), dtype).reshape(shape))
    return about["header"], arrays


def _exactly(stream: BinaryIO, size: int) -> bytearray:
    data = bytearray(stream.read(size))
    if len(data) < size:
        raise ValueError(f"the message ends after {len(data)} of {size} bytes")
    return data
