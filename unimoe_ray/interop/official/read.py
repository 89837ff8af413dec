"""An official checkpoint to our weights, file by file: what is in memory at a time is one tensor, mapped from one file,
and the small adapter that is added to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unimoe_ray.config.model import ModelConfig
from unimoe_ray.errors import UnimoeError
from unimoe_ray.interop.official.files import find_groups, open_tensors, read_json, shapes_of
from unimoe_ray.interop.official.names import VIDEO
from unimoe_ray.interop.official.plan import Origin, Plan, check, make_plan
from unimoe_ray.interop.official.sizes import feature_dims, is_8e, model_config
from unimoe_ray.interop.stream import TensorWriter
from unimoe_ray.model.connectors import build_connector
from unimoe_ray.model.unimoe import UniMoE

_SEED = 0  # of connectors that the checkpoint lacks: importing twice gives the same model
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Checkpoint:
    """What ``write_weights`` is to write. report: see ``Plan.report``."""

    config: ModelConfig
    vocab_size: int
    feature_dims: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    plan: Plan
    fresh: dict[str, nn.Module]
    report: dict[str, Any]


def open_checkpoint(folders: list[Path]) -> Checkpoint:
    """From names and shapes, without reading weights. ``folders``: a base checkpoint, and what was tuned on it, in the
    order in which they are loaded.

    Raises UnimoeError naming the file: one that is missing or unreadable, a tensor that is unknown, missing or of
    another shape, a setting that our model has no equal of.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UnimoeError(f"{folder}: no such folder")
    groups, unread = find_groups(folders)
    if not groups or groups[0].kind != "base":
        raise UnimoeError(f"{folders[0]}: no pytorch_model-*.bin with an index, nor model-*.safetensors")
    config = _read_config(folders)
    adapter = next((read_json(p) for f in reversed(folders) if (p := f / "adapter_config.json").is_file()), {})
    found = [(group, {path: shapes_of(path) for path in group.paths}) for group in groups]
    plan = make_plan(found, config, adapter)
    settings = model_config(config, plan.shapes)
    if settings.video_shares_image:
        plan.share_projector()
    dims = feature_dims(config, plan.shapes)
    vocab = plan.shapes.get("language.model.embed_tokens.weight", (config["vocab_size"],))[0]
    with torch.device("meta"):
        model = UniMoE(settings, vocab, dims)
        model.make_sparse()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if settings.video_shares_image:
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith(VIDEO)}
    if settings.language.tie_embeddings:
        shapes.pop("language.lm_head.weight")
    fresh = _new_connectors(settings, dims, plan)
    new = {name for kind, module in fresh.items() for name in _names(kind, module)}
    check(plan, {name: shape for name, shape in shapes.items() if name not in new}, is_8e(config))
    return Checkpoint(settings, vocab, dims, shapes, plan, fresh, plan.report(unread, sorted(fresh)))


def write_weights(
    checkpoint: Checkpoint,
    path: Path,
    on_progress: Progress = lambda done, total: None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """All weights into one safetensors file. Adapters are merged in fp32 and the result is rounded once: published
    numbers were made in fp16 and then bf16, and carry that rounding."""
    by_file: dict[Path, list[str]] = {}
    for target, source in checkpoint.plan.sources.items():
        by_file.setdefault(source.origin.path, []).append(target)
    with TensorWriter(path, checkpoint.shapes, dtype) as writer:
        for kind, module in checkpoint.fresh.items():
            for name, tensor in module.state_dict().items():
                writer.write(f"connectors.{kind}.{name}", tensor)
        for number, (file, targets) in enumerate(by_file.items()):
            on_progress(number, len(by_file))
            _write_file(writer, checkpoint.plan, file, targets)


def _write_file(writer: TensorWriter, plan: Plan, file: Path, targets: list[str]) -> None:
    """What comes from one file. In a function of its own, so that no tensor keeps the file mapped."""
    with ExitStack() as stack:
        opened: dict[Path, Mapping[str, torch.Tensor]] = {}

        def read(origin: Origin) -> torch.Tensor:
            if origin.path not in opened:
                opened[origin.path] = stack.enter_context(open_tensors(origin.path))
            return opened[origin.path][origin.name].float()

        for target in targets:
            source = plan.sources[target]
            tensor = read(source.origin)
            if source.lora is not None:
                a, b = (read(source.lora.parts[part]) for part in "AB")
                tensor = tensor + source.lora.scale * (b @ a)
            writer.write(target, tensor)


def _read_config(folders: list[Path]) -> dict[str, Any]:
    """The 8-expert model's ``8config.json`` replaces its base's, which users of the official code do by hand."""
    for name in ("8config.json", "config.json"):
        for folder in reversed(folders):
            if (folder / name).is_file():
                return read_json(folder / name)
    raise UnimoeError(f"{folders[0]}: config.json is missing")


def _new_connectors(settings: ModelConfig, dims: dict[str, int], plan: Plan) -> dict[str, nn.Module]:
    """The official models have sound or speech, ours has both: the other one starts as stage 1 does."""
    fresh = {}
    for kind in ("audio", "speech"):
        if not any(name.startswith(f"connectors.{kind}.") for name in plan.sources):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(_SEED)
                fresh[kind] = build_connector(
                    kind, dims[kind], settings.language.hidden_size, settings.connector_of(kind), settings.video
                )
    if len(fresh) == 2:
        raise UnimoeError("mm_audio_aligner.bin is missing")
    return fresh


def _names(kind: str, module: nn.Module) -> list[str]:
    return [f"connectors.{kind}.{name}" for name in module.state_dict()]
