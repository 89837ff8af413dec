"""Messages to vLLM's process: what is written is read, and what is no message is refused before it takes memory."""

from __future__ import annotations

import io
import json
import struct

import numpy as np
import pytest

from unimoe_ray.inference.vllm_plugin.frames import MAX_ARRAYS, MAX_HEADER, read_frame, write_frame


def test_what_is_written_is_read():
    stream = io.BytesIO()
    sent = [
        ({"wish": "answer", "id": "ü"}, [np.arange(12, dtype=np.float32).reshape(3, 4).T, np.zeros((0, 7), np.int64)]),
        ({}, []),
        ({"outputs": [{"tokens": [1, 2]}]}, [np.array([[1 << 40]], np.int64)]),
    ]
    for header, arrays in sent:
        write_frame(stream, header, arrays)
    stream.seek(0)
    for header, arrays in sent:
        found, values = read_frame(stream)
        assert found == header
        assert [(v.dtype, v.shape, v.tolist()) for v in values] == [(a.dtype, a.shape, a.tolist()) for a in arrays]
    assert read_frame(stream) is None


def frame(arrays: list, data: bytes = b"") -> bytes:
    text = json.dumps({"header": {}, "arrays": arrays}).encode()
    return struct.pack("<I", len(text)) + text + data


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x01", "bytes"),
        (struct.pack("<I", MAX_HEADER + 1), f"allowed: {MAX_HEADER}"),
        (struct.pack("<I", 50) + b"{}", "ends after 2 of 50 bytes"),
        (frame([["float32", [2, 3]]], b"abc"), "ends after 3 of 24 bytes"),
        (frame([["float32", [1 << 40, 1 << 40]]]), f"allowed: {MAX_ARRAYS}"),
        (frame([["float32", [1 << 28]], ["float32", [1]]]), "ends after 0 of"),
        (frame([["object", [1]]], b"12345678"), "an array object"),
        (frame([["float32", [-1]]]), r"\[-1\]"),
    ],
)
def test_what_is_no_message(data, reason):
    with pytest.raises(ValueError, match=reason):
        read_frame(io.BytesIO(data))
