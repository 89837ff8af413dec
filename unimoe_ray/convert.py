"""Model folders to and from other formats: ``unimoe export`` and ``unimoe import``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unimoe_ray import config
from unimoe_ray.data.features import TOWER_OF
from unimoe_ray.errors import UnimoeError, UsageError
from unimoe_ray.evaluation.evaluate import final_model
from unimoe_ray.interop.huggingface import UniMoEForConditionalGeneration, UniMoEProcessor
from unimoe_ray.interop.mixtral import write_mixtral
from unimoe_ray.interop.tokenizer import wrap_tokenizer
from unimoe_ray.mini import source as mini
from unimoe_ray.training.checkpoint import check_tower, load_model


def export(run: Path, form: str, to: Path) -> None:
    """Write the last finished model of a run, or a model folder, in one of ``FORMATS``.

    Raises UsageError when ``to`` holds files, UnimoeError for a model that the format can't hold.
    """
    with _new_folder(to) as folder:
        FORMATS[form](run, folder)


def model_of(run: Path) -> Path:
    """The folder of the last finished model of a run folder; a model folder is its own."""
    return run if _is_model(run) else final_model(config.load_run(run))


def _is_model(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def _mixtral(run: Path, folder: Path) -> None:
    source = model_of(run)
    model, _, _ = load_model(source)
    write_mixtral(model.language, folder)
    wrap_tokenizer(source / "tokenizer.json", model.language.config.max_position_embeddings).save_pretrained(folder)


def _huggingface(run: Path, folder: Path) -> None:
    if _is_model(run):
        raise UnimoeError(f"{run}: the format hf holds the towers too, which a model folder lacks; give a run folder")
    source = model_of(run)
    model, info, _ = load_model(source)
    towers = mini.towers(config.load_run(run))
    for modality in info.towers:
        check_tower(source, info, modality, towers[TOWER_OF[modality]])
    whole = UniMoEForConditionalGeneration.wrap(model, towers, info.sparse)
    whole.save_pretrained(folder)
    tokenizer = wrap_tokenizer(source / "tokenizer.json", model.language.config.max_position_embeddings)
    UniMoEProcessor.of(whole.config, tokenizer).save_pretrained(folder)


FORMATS = {"mixtral": _mixtral, "hf": _huggingface}


@contextmanager
def _new_folder(to: Path) -> Iterator[Path]:
    """A folder beside ``to`` that takes its place when all went well; else nothing is left."""
    refuse_files(to)
    temporary = to.with_name(f".{to.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if to.is_dir():
            to.rmdir()
        temporary.replace(to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_files(to: Path) -> None:
    """Raises UsageError unless ``to`` can be made or is an empty folder."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UsageError(f"--to {to}: exists; give a folder that does not")
