"""One rank's part of a state: a safetensors file of fp32 vectors, written and read in pieces, hashed on the way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence

import numpy as np

from unimoe_ray.checkpoint.storage import Folder

CHUNK = 2**23  # bytes that are hashed and written at a time
MAX_HEADER = 2**27
_ALIGNMENT = 8


def write_part(folder: Folder, name: str, tensors: Sequence[tuple[str, int]], values: np.ndarray) -> tuple[int, str]:
    """Write ``values`` (fp32, 1-D), which are those of ``tensors`` (name, length) end to end. Returns the size of the
    file in bytes and its SHA-256."""
    digest, written = hashlib.sha256(), 0
    with folder.create(name) as file:
        for piece in _pieces(tensors, values):
            digest.update(piece)
            file.write(piece)
            written += len(piece)
    return written, digest.hexdigest()


def _pieces(tensors: Sequence[tuple[str, int]], values: np.ndarray) -> Iterator[bytes | memoryview]:
    header, at = {}, 0
    for key, length in tensors:
        end = at + length * values.itemsize
        header[key] = {"dtype": "F32", "shape": [length], "data_offsets": [at, end]}
        at = end
    if at != values.nbytes:
        raise ValueError(f"{values.nbytes} bytes of values for tensors of {at}")
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    data = memoryview(values).cast("B")
    for start in range(0, len(data), CHUNK):
        yield data[start : start + CHUNK]


def hash_part(folder: Folder, name: str) -> str:
    """SHA-256 of a file as it lies there now."""
    digest = hashlib.sha256()
    for chunk in folder.chunks(name, CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def tensor_places(folder: Folder, name: str) -> dict[str, tuple[int, int]]:
    """{tensor: (first byte in the file, number of values)} of a part. Raises ValueError for what is no such file."""
    size = int.from_bytes(folder.read(name, 0, 8), "little")
    if not 0 < size <= MAX_HEADER:
        raise ValueError(f"{name}: not a safetensors file")
    header = json.loads(folder.read(name, 8, 8 + size))
    places = {}
    try:
        for key, about in header.items():
            (length,), (start, stop) = about["shape"], about["data_offsets"]
            if about["dtype"] != "F32" or not 0 <= start <= stop or stop - start != 4 * length:
                raise ValueError
            places[key] = (8 + size + start, length)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{name}: its header is not one of fp32 vectors") from None
    return places
