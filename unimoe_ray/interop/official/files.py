"""The files of official checkpoints, and the tensors in one file without reading them all at once."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from unimoe_ray.errors import UnimoeError

# Besides the shards, by name without suffix, in the order in which the official inference loads them. What comes later
# replaces what came before. Ours only: the two aligners and projectors of a model that has both.
EXPERT_FILES = ("audiocap", "basev", "base", "base1", "base4", "base7")
LOAD_ORDER = (
    "mm_projector",
    "mm_video_projector",
    "non_lora_trainables",
    *(f"mlp_{name}" for name in EXPERT_FILES),
    r"\d+_mlp_experts",
    "adapter_model",
    "mm_audio_aligner",
    "mm_speech_aligner",
    "mlp_gates",
)
SUFFIXES = (".safetensors", ".bin", ".pt")


@dataclass(frozen=True)
class Group:
    """Files that are read as one: the shards of a base checkpoint, or one other file. kind: ``base`` or its entry in
    ``LOAD_ORDER``; number: of an expert file."""

    kind: str
    paths: tuple[Path, ...]
    number: int = 0


def find_groups(folders: list[Path]) -> tuple[list[Group], list[Path]]:
    """Groups in load order (within a kind, in the order of ``folders``), and weight files that are in none.

    Raises UnimoeError naming shards that an index lists and the folder lacks.
    """
    groups = [Group("base", tuple(paths)) for folder in folders if (paths := _shards(folder))]
    for kind in LOAD_ORDER:
        for folder in folders:
            stems = {path.stem for path in folder.iterdir() if path.suffix in SUFFIXES}
            for stem in sorted(stems, key=lambda stem: (len(stem), stem)):
                if re.fullmatch(kind, stem):
                    number = int(stem.split("_")[0]) if stem[0].isdigit() else 0
                    groups.append(Group(kind, (_preferred(folder, stem),), number))
    taken = {path for group in groups for path in group.paths}
    weights = sorted(path for folder in folders for path in folder.iterdir() if path.suffix in SUFFIXES)
    return groups, [path for path in weights if path not in taken]


def read_json(path: Path) -> dict[str, Any]:
    """Raises UnimoeError for a file that is not there or no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnimoeError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UnimoeError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UnimoeError(f"{path}: holds {type(value).__name__}, not an object")
    return value


@contextmanager
def open_tensors(path: Path) -> Iterator[Mapping[str, torch.Tensor]]:
    """Tensors by name; they are mapped from the file and must not outlive the block. (A .bin of torch before 1.6 can't
    be mapped and is read whole.) Pickles can't hold code here: ``weights_only``. Raises UnimoeError."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                yield _Lazy(file)
        except (OSError, SafetensorError) as error:
            raise UnimoeError(f"{path}: not readable: {error}") from None
        return
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UnimoeError(f"{path}: not readable as weights only: {str(error).splitlines()[0]}") from None
    strange = [name for name, value in content.items() if not torch.is_tensor(value)] if _is_dict(content) else ["it"]
    if strange:
        raise UnimoeError(f"{path}: {strange[0]} is not a tensor")
    yield content


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    with open_tensors(path) as tensors:
        if isinstance(tensors, _Lazy):
            return tensors.shapes()
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


class _Lazy(Mapping[str, torch.Tensor]):
    def __init__(self, file):
        self._file = file

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(self._file.get_slice(name).get_shape()) for name in self}


def _is_dict(content: Any) -> bool:
    return isinstance(content, dict)


def _shards(folder: Path) -> list[Path]:
    """Of a base checkpoint, safetensors where there are both."""
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            names = sorted(set(read_json(index).get("weight_map", {}).values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise UnimoeError(f"{folder}: {missing[0]} is missing, one of {len(names)} that {index.name} lists")
            return [folder / name for name in names]
        if (folder / f"{stem}{suffix}").is_file():
            return [folder / f"{stem}{suffix}"]
    return []


def _preferred(folder: Path, stem: str) -> Path:
    return next(path for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").is_file())
