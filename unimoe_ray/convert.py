"""Model folders to and from other formats: ``unimoe export`` and ``unimoe import``."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from unimoe_ray import config
from unimoe_ray.config import Config
from unimoe_ray.data.features import TOWER_OF
from unimoe_ray.data.sentencepiece import load_sentencepiece
from unimoe_ray.errors import UnimoeError, UsageError
from unimoe_ray.evaluation.evaluate import final_model
from unimoe_ray.interop.huggingface import UniMoEForConditionalGeneration, UniMoEProcessor
from unimoe_ray.interop.mixtral import write_mixtral
from unimoe_ray.interop.official.read import Progress, open_checkpoint, write_weights
from unimoe_ray.interop.official.write import write_official
from unimoe_ray.interop.tokenizer import wrap_tokenizer
from unimoe_ray.towers import load_towers
from unimoe_ray.training.checkpoint import WEIGHTS, ModelInfo, check_tower, load_model, new_model_folder


def export(run: Path, form: str, to: Path) -> None:
    """Write the last finished model of a run, or a model folder, in one of ``FORMATS``.

    Raises UsageError when ``to`` holds files, UnimoeError for a model that the format can't hold.
    """
    with _new_folder(to) as folder:
        FORMATS[form](run, folder)


def import_official(
    folders: list[Path], to: Path, on_progress: Progress, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """A model folder of an official checkpoint, and its report, which is ``import_report.json`` in there as well.
    ``dtype``: of the weights in the file.

    Raises UsageError when ``to`` holds files, UnimoeError for what is missing, unknown or does not fit.
    """
    refuse_files(to)
    checkpoint = open_checkpoint(folders)
    info = ModelInfo(
        checkpoint.config.model_dump(mode="json"),
        checkpoint.vocab_size,
        checkpoint.feature_dims,
        sparse=True,
        towers={},
        random_towers=False,
    )
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = _tokenizer(folders, Path(scratch))
        with new_model_folder(to, info, tokenizer, "import") as folder:
            write_weights(checkpoint, folder / WEIGHTS, on_progress, dtype)
            (folder / REPORT).write_text(json.dumps(checkpoint.report, indent=1))
    return checkpoint.report


def summary(report: dict[str, Any]) -> list[str]:
    """A few lines for people of what ``import_official`` returns."""
    used, reasons = report["used"], Counter(entry["reason"] for entry in report["ignored"])
    lines = [f"{sum(used.values())} tensors of {len(used)} files used"]
    lines += [f"{count} tensors ignored: {reason}" for reason, count in reasons.most_common()]
    lines += [f"{name} not read: no file of the model's" for name in report["files_not_read"]]
    lines += [f"the {kind} connector is new: the checkpoint has none" for kind in report["new_connectors"]]
    return lines


def _tokenizer(folders: list[Path], scratch: Path) -> Path:
    """``tokenizer.json``: that of a folder, or made of LLaMA's ``tokenizer.model``."""
    for folder in folders:
        if (folder / "tokenizer.json").is_file():
            return folder / "tokenizer.json"
        if (folder / "tokenizer.model").is_file():
            load_sentencepiece(folder / "tokenizer.model").save(str(scratch / "tokenizer.json"))
            return scratch / "tokenizer.json"
    raise UnimoeError(f"{folders[0]}: tokenizer.model is missing, nor is there a tokenizer.json")


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
    source = model_of(run)
    model, info, _ = load_model(source)
    towers = load_towers(_settings(run, info))
    for modality in info.towers:
        check_tower(source, info, modality, towers[TOWER_OF[modality]])
    whole = UniMoEForConditionalGeneration.wrap(model, towers, info.sparse)
    if not torch.cuda.is_available():
        # transformers asks DeepSpeed, which would print on stdout that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    whole.save_pretrained(folder)
    tokenizer = wrap_tokenizer(source / "tokenizer.json", model.language.config.max_position_embeddings)
    UniMoEProcessor.of(whole.config, tokenizer).save_pretrained(folder)


def _settings(run: Path, info: ModelInfo) -> Config:
    """Of a run folder; of a model folder, what it says of its towers."""
    if not _is_model(run):
        return config.load_run(run)
    return config.parse({"model": info.model, "mini": {"random_towers": info.random_towers}})


def _official(run: Path, folder: Path) -> None:
    source = model_of(run)
    model, _, _ = load_model(source)
    write_official(model, folder)
    shutil.copy(source / "tokenizer.json", folder)


FORMATS = {"mixtral": _mixtral, "hf": _huggingface, "official": _official}
REPORT = "import_report.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
