"""Builds the small towers of the embedded default, pretrained or with random weights."""

from __future__ import annotations

import contextlib
import pickle
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from unimoe_ray.errors import UnimoeError, UsageError
from unimoe_ray.mini import ct2
from unimoe_ray.mini.assets import Assets, cache_root
from unimoe_ray.model.features import Tower
from unimoe_ray.model.towers import randomise
from unimoe_ray.model.towers.efficientnet_lite import EfficientNetLite0, EfficientNetLiteTower
from unimoe_ray.model.towers.whisper import WhisperTower, tiny_encoder
from unimoe_ray.model.towers.yamnet import Yamnet, YamnetTower

State = dict[str, torch.Tensor]


def load_towers(names: dict[str, str], assets: Assets | None, random: bool = False, seed: int = 0) -> dict[str, Tower]:
    """Towers by modality, from their names by modality, on the CPU and frozen.

    ``random`` gives the same architectures seeded random weights and needs no assets. Raises UsageError for an unknown
    modality or name, UnimoeError when weights are missing or damaged.
    """
    for modality, name in names.items():
        if modality not in TOWERS:
            raise UsageError(f"towers: unknown modality {modality!r}, allowed are {', '.join(TOWERS)}")
        if name not in TOWERS[modality]:
            raise UsageError(f"towers.{modality}: unknown tower {name!r}, allowed is {', '.join(TOWERS[modality])}")
    if not random and assets is None:
        raise UnimoeError("pretrained towers need the mini assets; random weights do not")
    return {m: TOWERS[m][name](None if random else assets, seed) for m, name in names.items()}


def _efficientnet_lite0(assets: Assets | None, seed: int) -> EfficientNetLiteTower:
    network = load_efficientnet_lite0(assets) if assets is not None else EfficientNetLite0()
    if assets is None:
        randomise(network, seed)
    return EfficientNetLiteTower(network)


def _whisper_tiny_en(assets: Assets | None, seed: int) -> WhisperTower:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = tiny_encoder()
    if assets is not None:
        path = assets.path("whisper_tiny_en") / "model.bin"
        source = assets.sha256("whisper_tiny_en", "model.bin")
        _fill(encoder, _converted(assets, "whisper_tiny_en", source, lambda: ct2.whisper_encoder_state(path)), path)
    return WhisperTower(encoder)


def _yamnet(assets: Assets | None, seed: int) -> YamnetTower:
    network = load_yamnet(assets) if assets is not None else Yamnet()
    if assets is None:
        randomise(network, seed)
    return YamnetTower(network)


def load_efficientnet_lite0(assets: Assets) -> EfficientNetLite0:
    """The whole pretrained network, with its classifier and batch norms."""
    path = assets.path("efficientnet_lite0") / "efficientnet_lite0.pth"
    try:
        published = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UnimoeError(f"{path}: not readable weights: {str(error).splitlines()[0]}") from error
    network = EfficientNetLite0()
    # The published names have an underscore before each part: _blocks.0._bn1.weight.
    _fill(network, {re.sub(r"(^|\.)_", r"\1", key): tensor for key, tensor in published.items()}, path)
    return network


def load_yamnet(assets: Assets) -> Yamnet:
    """The whole pretrained network, with its classifier."""
    path = assets.path("yamnet") / "model.onnx"
    source = assets.sha256("yamnet", "model.data")
    network = Yamnet()
    _fill(network, _converted(assets, "yamnet", source, lambda: _yamnet_state(path)), path)
    return network


TOWERS: dict[str, dict[str, Callable[[Assets | None, int], Tower]]] = {
    "image": {"efficientnet_lite0": _efficientnet_lite0},
    "speech": {"whisper_tiny_en": _whisper_tiny_en},
    "audio": {"yamnet": _yamnet},
}


def _yamnet_state(path: Path) -> State:
    """State dict of Yamnet from the ONNX export. Its graph quantises, but the full float32 weights are what is stored;
    the layers come in order, as the graph is a chain."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    arrays = {tensor.name: tensor for tensor in graph.initializer}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    state = {}
    for index, node in enumerate(layers):
        target = f"convolutions.{index}" if node.op_type == "Conv" else "classifier"
        for part, name in zip(("weight", "bias"), node.input[1:3], strict=True):
            name = name.removesuffix("_qdq")
            if name not in arrays:
                raise UnimoeError(f"{path}: no tensor {name}")
            state[f"{target}.{part}"] = torch.from_numpy(numpy_helper.to_array(arrays[name]).copy())
    return state


def _fill(network: torch.nn.Module, state: State, path: Path) -> None:
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UnimoeError(
            f"{path}: the weights do not fit the network: {str(error).splitlines()[-1].strip()}"
        ) from error


def _converted(assets: Assets, name: str, source: str, convert: Callable[[], State]) -> State:
    """Weights converted to safetensors once, kept in the cache by the hash of what they were made from. A folder given
    by $UNIMOE_MINI_DIR is read but not written to; where nothing can be written they are converted each time."""
    file = f"{name}-{source[:16]}.safetensors"
    for folder in (assets.root, cache_root()):
        path = folder / "converted" / file
        with contextlib.suppress(OSError, safetensors.SafetensorError):
            return safetensors.torch.load_file(path)
    state = convert()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            fresh = Path(folder) / file
            fresh.write_bytes(safetensors.torch.save(state))
            fresh.replace(path)
    return state
