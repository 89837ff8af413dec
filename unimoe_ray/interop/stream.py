"""One safetensors file, written tensor by tensor in any order, so that no model has to fit in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch

_ALIGNMENT = 8
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class TensorWriter:
    """A context manager. ``shapes``: every tensor that the file will hold, all of one ``dtype``; each is to be written
    once.

    Raises ValueError for another name or shape, one that was written already, and at the end for what is missing.
    """

    def __init__(self, path: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype = torch.float32):
        self._dtype = dtype
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, shape in shapes.items():
            size = dtype.itemsize * math.prod(shape)
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._start = 8 + len(text)
        self._left = {name: header[name] for name in shapes}
        self._file = open(path, "wb")  # noqa: SIM115, __exit__ closes it
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._start + at)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        about = self._left.get(name)
        if about is None or about["shape"] != list(tensor.shape):
            raise ValueError(f"{name} {tuple(tensor.shape)} is not to be written")
        del self._left[name]
        self._file.seek(self._start + about["data_offsets"][0])
        values = tensor.detach().to("cpu", self._dtype).contiguous()
        self._file.write(values.reshape(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._left:
            raise ValueError(f"{len(self._left)} tensors were not written, such as {next(iter(self._left))}")
