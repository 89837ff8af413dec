"""Reads the binary models of CTranslate2 (format version 6), as in python/ctranslate2/specs/model_spec.py there."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import torch

from unimoe_ray.errors import UnimoeError

VERSION = 6
_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def read_variables(path: Path, prefix: str = "") -> dict[str, np.ndarray]:
    """The variables whose names begin with ``prefix``, by name. The arrays are read-only views of the file in memory.
    Raises UnimoeError for a file that is not of this format, is cut off, or contradicts itself."""
    data = path.read_bytes()
    at = 0

    def take(size: int) -> memoryview:
        nonlocal at
        if size > len(data) - at:
            raise UnimoeError(f"{path}: cut off at byte {at}")
        at += size
        return memoryview(data)[at - size : at]

    def number(code: str) -> int:
        return struct.unpack(f"<{code}", take(struct.calcsize(code)))[0]

    def text() -> str:
        raw = bytes(take(number("H")))
        try:
            return raw.rstrip(b"\0").decode()
        except UnicodeDecodeError as error:
            raise UnimoeError(f"{path}: unreadable name before byte {at}") from error

    if (version := number("I")) != VERSION:
        raise UnimoeError(f"{path}: CTranslate2 format version {version}, only {VERSION} can be read")
    text()  # the name of the architecture
    number("I")  # its revision
    variables = {}
    for _ in range(number("I")):
        name = text()
        shape = tuple(number("I") for _ in range(number("B")))
        kind, size = number("B"), number("I")
        content = take(size)
        if kind not in _DTYPES or math.prod(shape) * np.dtype(_DTYPES[kind]).itemsize != size:
            raise UnimoeError(f"{path}: variable {name}: type {kind}, shape {shape} and {size} bytes do not agree")
        if name.startswith(prefix):
            variables[name] = np.frombuffer(content, _DTYPES[kind]).reshape(shape)
    return variables


def whisper_encoder_state(path: Path) -> dict[str, torch.Tensor]:
    """State dict of Hugging Face's WhisperEncoder (tensors as stored: float16) from a CTranslate2 Whisper model.
    Raises UnimoeError when a tensor is missing or quantised."""
    variables = read_variables(path, "encoder/")

    def get(name: str) -> torch.Tensor:
        array = variables.get(f"encoder/{name}")
        if array is None or array.dtype not in (np.float16, np.float32):
            raise UnimoeError(f"{path}: no floating-point tensor encoder/{name}")
        return torch.from_numpy(array.copy())

    state = {"embed_positions.weight": get("position_encodings/encodings")}

    def copy(target: str, source: str, weight: str = "weight", bias: str = "bias") -> None:
        state[f"{target}.weight"] = get(f"{source}/{weight}")
        state[f"{target}.bias"] = get(f"{source}/{bias}")

    copy("conv1", "conv1")
    copy("conv2", "conv2")
    copy("layer_norm", "layer_norm", "gamma", "beta")
    layers = len({name.split("/")[1] for name in variables if name.startswith("encoder/layer_") and name[14].isdigit()})
    for layer in range(layers):
        target, source = f"layers.{layer}", f"layer_{layer}"
        # Query, key and value are stored as one matrix; Whisper's keys have no bias (zeros are stored).
        weights = get(f"{source}/self_attention/linear_0/weight").chunk(3)
        biases = get(f"{source}/self_attention/linear_0/bias").chunk(3)
        for part, weight, bias in zip("qkv", weights, biases, strict=True):
            state[f"{target}.self_attn.{part}_proj.weight"] = weight.clone()
            if part != "k":
                state[f"{target}.self_attn.{part}_proj.bias"] = bias.clone()
        copy(f"{target}.self_attn.out_proj", f"{source}/self_attention/linear_1")
        copy(f"{target}.self_attn_layer_norm", f"{source}/self_attention/layer_norm", "gamma", "beta")
        copy(f"{target}.fc1", f"{source}/ffn/linear_0")
        copy(f"{target}.fc2", f"{source}/ffn/linear_1")
        copy(f"{target}.final_layer_norm", f"{source}/ffn/layer_norm", "gamma", "beta")
    return state
