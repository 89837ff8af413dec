"""Towers as JSON: their architecture and settings, without weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from unimoe_ray.errors import UnimoeError
from unimoe_ray.model.towers import FrozenTower
from unimoe_ray.model.towers.beats import Beats, BeatsConfig, BeatsTower
from unimoe_ray.model.towers.clip import ClipTower
from unimoe_ray.model.towers.efficientnet_lite import EfficientNetLite0, EfficientNetLiteTower
from unimoe_ray.model.towers.whisper import WhisperFullTower, WhisperTower, tiny_encoder
from unimoe_ray.model.towers.yamnet import Yamnet, YamnetTower


def describe_tower(tower: FrozenTower) -> dict[str, Any]:
    """``build_tower`` of it has the same parameters and settings. Raises UnimoeError for an unknown tower."""
    if tower.name not in _BUILDERS:
        raise UnimoeError(f"the {tower.name} tower can't be described; only {', '.join(_BUILDERS)}")
    description = {"name": tower.name, "settings": tower.settings}
    if isinstance(tower, ClipTower | WhisperFullTower):
        description["network"] = tower.network.config.to_dict()
    if isinstance(tower, BeatsTower):
        description["network"] = asdict(tower.network.config)
    return description


def build_tower(description: dict[str, Any]) -> FrozenTower:
    """With random weights, on torch's current default device."""
    return _BUILDERS[description["name"]](description["settings"], description.get("network", {}))


def _efficientnet_lite(settings: dict[str, Any], _: dict[str, Any]) -> FrozenTower:
    return EfficientNetLiteTower(EfficientNetLite0(), settings["size"], settings["last_block"])


def _whisper_tiny(settings: dict[str, Any], _: dict[str, Any]) -> FrozenTower:
    return WhisperTower(tiny_encoder(), settings["pool"])


def _yamnet(_: dict[str, Any], __: dict[str, Any]) -> FrozenTower:
    return YamnetTower(Yamnet())


def _clip(settings: dict[str, Any], network: dict[str, Any]) -> FrozenTower:
    vision = CLIPVisionModel(CLIPVisionConfig(**network))
    return ClipTower(vision, settings["aspect"], settings["select_layer"])


def _whisper(settings: dict[str, Any], network: dict[str, Any]) -> FrozenTower:
    return WhisperFullTower(WhisperEncoder(WhisperConfig(**network)), settings["max_windows"])


def _beats(settings: dict[str, Any], network: dict[str, Any]) -> FrozenTower:
    return BeatsTower(Beats(BeatsConfig(**network)), settings["window"], settings["max_windows"])


_BUILDERS = {
    EfficientNetLiteTower.name: _efficientnet_lite,
    WhisperTower.name: _whisper_tiny,
    YamnetTower.name: _yamnet,
    ClipTower.name: _clip,
    WhisperFullTower.name: _whisper,
    BeatsTower.name: _beats,
}


def towers_without_weights(descriptions: dict[str, dict[str, Any]]) -> dict[str, FrozenTower]:
    """For ``preprocess`` and ``tokens_for``, which need none."""
    with torch.device("meta"):
        return {modality: build_tower(description) for modality, description in descriptions.items()}
