"""Model folders at the end of a stage: weights, configuration and tokenizer, committed by a checksummed manifest."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import LlamaConfig

from unimoe_ray.config.model import ModelConfig
from unimoe_ray.data.template import Template, make_template
from unimoe_ray.data.tokenizer import load_tokenizer
from unimoe_ray.errors import UnimoeError
from unimoe_ray.model.connectors import build_connector
from unimoe_ray.model.features import Tower
from unimoe_ray.model.pretrained import uninitialised
from unimoe_ray.model.unimoe import UniMoE

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class ModelInfo:
    """What is needed to build the model of a folder, and to talk to it.

    towers: fingerprint of each modality's tower
    llama: architecture of a pretrained language model; without it, as ``model`` states
    template, legacy: see ``data.template.make_template``
    """

    model: dict[str, Any]
    vocab_size: int
    feature_dims: dict[str, int]
    sparse: bool
    towers: dict[str, str]
    random_towers: bool
    llama: dict[str, Any] | None = None
    template: str = "compact"
    legacy: bool = True

    def build(self, *, pretrained: str | None = None) -> UniMoE:
        """``pretrained``: with the weights of the language model in this folder or of this hub name; else they are
        random, for a checkpoint's to be loaded."""
        settings = ModelConfig.model_validate(self.model)
        if pretrained is not None:
            language = settings.language.model_copy(update={"pretrained": pretrained})
            settings, llama = settings.model_copy(update={"language": language}), None
        else:
            llama = None if self.llama is None else LlamaConfig.from_dict(self.llama)
        model = UniMoE(settings, self.vocab_size, self.feature_dims, llama)
        if self.sparse:
            model.make_sparse()
        return model

    def make_template(self, tokenizer: Tokenizer) -> Template:
        return make_template(self.template, tokenizer, self.legacy)


def checkpoint_dir(run_dir: Path, stage: str, run: str) -> Path:
    """``checkpoints/<stage>``, or ``checkpoints/<stage>-<run>`` where a stage has several runs."""
    return run_dir / "checkpoints" / (stage if stage == run else f"{stage}-{run}")


def save_model(folder: Path, model: UniMoE, info: ModelInfo, tokenizer: Path, made_by: str) -> None:
    """Write a model folder. ``made_by``: its recipe, a hash of all that decides what it learned."""
    with new_model_folder(folder, info, tokenizer, made_by) as temporary:
        save_file(_unique_tensors(model), temporary / WEIGHTS)


@contextmanager
def new_model_folder(folder: Path, info: ModelInfo, tokenizer: Path, made_by: str) -> Iterator[Path]:
    """A folder beside ``folder`` for the block to write ``WEIGHTS`` into. It takes the place of ``folder`` when
    complete; when the block raises, nothing is left of it."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        (temporary / "config.json").write_text(json.dumps(asdict(info), indent=1))
        shutil.copy(tokenizer, temporary / "tokenizer.json")
        files = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps({"recipe": made_by, "files": files}, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_complete(folder: Path, made_by: str | None = None) -> bool:
    """Whether a folder was committed, all files intact, and (if given) made by this recipe."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if made_by is not None and manifest["recipe"] != made_by:
            return False
        return all(_sha256(folder / name) == digest for name, digest in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def recipe(folder: Path) -> str:
    """The recipe that a complete folder was made by."""
    return json.loads((folder / "manifest.json").read_text())["recipe"]


def load_info(folder: Path) -> ModelInfo:
    """Raises UnimoeError when there is no complete model folder."""
    if not folder.is_dir():
        raise UnimoeError(f"{folder}: no such model folder")
    if not is_complete(folder):
        raise UnimoeError(
            f"{folder}: not a complete model folder (manifest.json is missing or does not match the files)"
        )
    try:
        return ModelInfo(**json.loads((folder / "config.json").read_text()))
    except TypeError as error:
        raise UnimoeError(f"{folder / 'config.json'}: of another version ({error})") from None


def load_model(folder: Path) -> tuple[UniMoE, ModelInfo, Tokenizer]:
    """The model in eval mode on the CPU, with its tokenizer. Raises UnimoeError naming the folder."""
    info = load_info(folder)
    with uninitialised():
        model = info.build()
    model.language.tie_weights()
    load_weights(model, folder)
    return model.eval(), info, load_tokenizer(folder / "tokenizer.json")


def load_connectors(folder: Path, modalities: list[str]) -> tuple[nn.ModuleDict, ModelInfo]:
    """These connectors alone, in eval mode on the CPU, without reading the language model's weights."""
    info = load_info(folder)
    config = ModelConfig.model_validate(info.model)
    connectors = nn.ModuleDict()
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            for modality in modalities:
                state = {}
                # A shared connector's layers have the image connector's name only.
                shared = modality == "video" and config.video_shares_image
                for prefix in [f"connectors.{m}." for m in (["image"] if shared else []) + [modality]]:
                    state |= {k.removeprefix(prefix): file.get_tensor(k) for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118
                hidden = file.get_slice("language.model.embed_tokens.weight").get_shape()[1]
                connector = build_connector(
                    modality, info.feature_dims[modality], hidden, config.connector_of(modality), config.video
                )
                connector.load_state_dict(state)
                connectors[modality] = connector
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise UnimoeError(f"{folder / 'model.safetensors'}: connectors can't be read: {error}") from None
    return connectors.eval(), info


def check_tower(folder: Path, info: ModelInfo, modality: str, tower: Tower) -> None:
    """Raises UnimoeError when the model was trained on the features of another tower."""
    if tower.fingerprint() != info.towers[modality]:
        raise UnimoeError(f"{folder}: was trained with another {modality} tower than the one loaded here")


def fingerprint(folder: Path) -> str:
    """Of a complete model folder: another one for other weights, configuration or tokenizer."""
    return _sha256(folder / "manifest.json")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UnimoeError(f"{folder / 'model.safetensors'}: {error}") from None


def load_weights(model: UniMoE, folder: Path) -> None:
    """Strict but for weights that are tied to another."""
    weights, own = read_weights(folder), model.state_dict()
    for name in sorted(weights.keys() & own.keys()):
        if weights[name].shape != own[name].shape:
            found, wanted = tuple(weights[name].shape), tuple(own[name].shape)
            raise UnimoeError(f"{folder}: the weights do not fit the configuration ({name}: {found}, wanted {wanted})")
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(model.state_dict()) - set(_unique_tensors(model))
    if unexpected or set(missing) - tied:
        first = sorted([*unexpected, *set(missing) - tied])[0]
        raise UnimoeError(f"{folder}: the weights do not fit the configuration (first: {first})")


def _unique_tensors(model: UniMoE) -> dict[str, torch.Tensor]:
    """The state dict without second names of tied weights."""
    seen: dict[int, str] = {}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if seen.setdefault(tensor.data_ptr(), name) == name or tensor.numel() == 0:
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
