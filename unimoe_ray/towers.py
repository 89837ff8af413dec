"""The frozen towers that a configuration names: the small ones of the embedded default, or published ones from files.

``model.towers`` holds networks that read no files; what reads them is here (and, for the small ones, in ``mini``).
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    WhisperConfig,
    WhisperModel,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import logging

from unimoe_ray.config import Config
from unimoe_ray.config.model import PUBLISHED_TOWERS, TowerConfig
from unimoe_ray.errors import UnimoeError
from unimoe_ray.mini import source as mini
from unimoe_ray.mini import towers as small
from unimoe_ray.model.features import Tower
from unimoe_ray.model.towers.beats import Beats, BeatsConfig, BeatsTower, load_beats
from unimoe_ray.model.towers.clip import ClipTower
from unimoe_ray.model.towers.whisper import WhisperFullTower
from unimoe_ray.model.towers.windows import MAX_WINDOWS

TOWERS = ("image", "speech", "audio")
# Of what Uni-MoE uses: openai/clip-vit-large-patch14-336 and openai/whisper-small (BeatsConfig's defaults are BEATs').
PUBLISHED_SIZES: dict[str, PreTrainedConfig] = {
    "clip": CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    ),
    "whisper": WhisperConfig(d_model=768, encoder_layers=12, encoder_attention_heads=12, encoder_ffn_dim=3072),
}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError)


def load_towers(config: Config) -> dict[str, Tower]:
    """Towers by modality, on the CPU. Raises UnimoeError as ``load_tower``."""
    return {modality: load_tower(config, modality) for modality in TOWERS}


def load_tower(config: Config, modality: str) -> Tower:
    """The tower of ``image``, ``speech`` or ``audio``, on the CPU; loaded once in a process.

    Raises UnimoeError, in one line that names the key, when weights are missing, damaged or of another model.
    """
    settings: TowerConfig = getattr(config.model.towers, modality)
    if settings.name not in PUBLISHED_TOWERS:
        return mini.towers(config, (modality,))[modality]
    return _load(f"model.towers.{modality}.path", settings.name, settings.path, getattr(settings, "max_windows", None))


def sketch_tower(config: Config, modality: str) -> Tower:
    """A tower without its weights, on the meta device, to count parameters: as its files say where they are on this
    machine, else of the published size (``PUBLISHED_SIZES``). Nothing is downloaded, a small tower is random."""
    settings: TowerConfig = getattr(config.model.towers, modality)
    name, path = settings.name, settings.path
    if name not in PUBLISHED_TOWERS:
        return small.load_towers({modality: name}, None, random=True)[modality]
    here = Path(path).exists()
    with _named(f"model.towers.{modality}.path", name, path), torch.device("meta"):
        if name == "beats":
            found = BeatsConfig.from_published(_beats_checkpoint(path, "meta")["cfg"]) if here else BeatsConfig()
            return BeatsTower(Beats(found))
        found = _config(type(PUBLISHED_SIZES[name]), path) if here else PUBLISHED_SIZES[name]
        return ClipTower(CLIPVisionModel(found)) if name == "clip" else WhisperFullTower(WhisperEncoder(found))


@lru_cache(maxsize=len(TOWERS))
def _load(key: str, name: str, path: str, max_windows: int | None) -> Tower:
    if not Path(path).exists() and (name == "beats" or not _HUB_NAME.fullmatch(path)):
        raise UnimoeError(f"{key}: {path}: no such file or folder; {name} wants {PUBLISHED_TOWERS[name]}")
    with _named(key, name, path):
        return _PUBLISHED[name](path, max_windows or MAX_WINDOWS)


@contextmanager
def _named(key: str, name: str, path: str) -> Iterator[None]:
    """What goes wrong with a file as one line that names the key."""
    try:
        yield
    except _UNREADABLE as error:
        raise UnimoeError(f"{key}: {path}: no {name} weights that can be read ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    """What is wrong; torch says in the second line which tensor does not fit."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[1] if len(lines) > 1 and lines[0].startswith("Error(s) in loading") else lines[0]


def _clip(path: str, _: int) -> ClipTower:
    return ClipTower(_pretrained(CLIPVisionModel, CLIPVisionConfig, path))


def _whisper(path: str, max_windows: int) -> WhisperFullTower:
    """The whole model is read, for its names to fit, and the decoder dropped."""
    return WhisperFullTower(_pretrained(WhisperModel, WhisperConfig, path).encoder, max_windows)


def _beats(path: str, max_windows: int) -> BeatsTower:
    return BeatsTower(load_beats(_beats_checkpoint(path, "cpu")), max_windows=max_windows)


def _beats_checkpoint(path: str, device: str) -> Mapping[str, Any]:
    checkpoint: Any = torch.load(path, map_location=device, weights_only=True)
    if not isinstance(checkpoint, Mapping) or not {"cfg", "model"} <= checkpoint.keys():
        held = ", ".join(sorted(checkpoint)) if isinstance(checkpoint, Mapping) else f"a {type(checkpoint).__name__}"
        raise ValueError(f"a BEATs checkpoint holds cfg and model; this one holds {held}")
    return checkpoint


_PUBLISHED: dict[str, Callable[[str, int], Tower]] = {"clip": _clip, "whisper": _whisper, "beats": _beats}


def _pretrained(kind: type[PreTrainedModel], config: type[PreTrainedConfig], path: str) -> Any:
    """``from_pretrained`` in fp32, but strict: weights that the files lack would otherwise be random.

    Raises ValueError naming the first of them, or the other kind of model that the folder holds.
    """
    found = _config(config, path)
    with _quiet():
        network, report = kind.from_pretrained(path, config=found, dtype=torch.float32, output_loading_info=True)
    missing = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing or of another shape, such as {missing[0]}")
    return network


def _config(kind: type[PreTrainedConfig], path: str) -> PreTrainedConfig:
    """Of the encoder, out of the ``config.json`` of a whole model too. Raises ValueError for another kind of model."""
    settings, _ = kind.get_config_dict(path)
    family = settings.get("model_type", "")
    if family.split("_")[0] != kind.model_type.split("_")[0]:
        raise ValueError(f"its config.json is of a '{family}' model" if family else "it has no config.json")
    return kind.from_pretrained(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no list of the weights that are left over (CLIP's text encoder)."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
