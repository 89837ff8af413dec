"""Hugging Face checkpoints, read strictly: the one place in the model where files are touched."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging

from unimoe_ray.errors import UnimoeError

_UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError)


def read_pretrained(kind: type[PreTrainedModel], config: type[PreTrainedConfig], path: str) -> Any:
    """``kind.from_pretrained`` in fp32, from a folder or the hub. Weights that the files lack would be random: they are
    an error. Raises ValueError naming the first of them, or as ``read_config``."""
    found = read_config(config, path)
    with quiet():
        network, report = kind.from_pretrained(path, config=found, dtype=torch.float32, output_loading_info=True)
    missing = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing or of another shape, such as {missing[0]}")
    return network


def read_config(kind: type[PreTrainedConfig], path: str) -> Any:
    """Also the part that ``kind`` describes, out of the ``config.json`` of a whole model. Raises ValueError for another
    family of models."""
    settings, _ = kind.get_config_dict(path)
    family = settings.get("model_type", "")
    if family.split("_")[0] != kind.model_type.split("_")[0]:
        raise ValueError(f"its config.json is of a '{family}' model" if family else "it has no config.json")
    return kind.from_pretrained(path)


@contextmanager
def naming(key: str, path: str, what: str) -> Iterator[None]:
    """What goes wrong with a file as an UnimoeError of one line, which names the configuration's key."""
    try:
        yield
    except _UNREADABLE as error:
        raise UnimoeError(f"{key}: {path}: no {what} that can be read ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    """What is wrong; torch says in the second line which tensor does not fit."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[1] if len(lines) > 1 and lines[0].startswith("Error(s) in loading") else lines[0]


@contextmanager
def uninitialised() -> Iterator[None]:
    """Modules made here have whatever was in memory for weights: for those that a file will fill at once, as random
    numbers for billions of parameters take minutes. Not for several threads at a time: torch's initialisers are off."""
    with no_init_weights():
        yield


@contextmanager
def quiet() -> Iterator[None]:
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
