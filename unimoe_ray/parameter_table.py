"""The sizes of a configuration's model, counted on the meta device: what ``unimoe train --dry-run`` prints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig

from unimoe_ray.config import Config
from unimoe_ray.config.model import MODALITIES
from unimoe_ray.config.training import STAGES
from unimoe_ray.data.features import TOWER_OF
from unimoe_ray.model.language import llama_config, pretrained_config
from unimoe_ray.model.sizes import active_per_token, in_experts, total
from unimoe_ray.model.unimoe import UniMoE
from unimoe_ray.towers import TOWERS, sketch_tower
from unimoe_ray.training.stages import make_trainable


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters. language: all, routers included; active: of the language model, for one token; dense: of
    the language model before stage 3; experts: those of the mixtures; connectors: by modality, without layers that are
    another's before it; trained: of each run, by ``<stage>`` or ``<stage>/<run>``."""

    language: int
    active: int
    dense: int
    experts: int
    connectors: dict[str, int]
    towers: dict[str, int]
    trained: dict[str, int]


def count_parameters(config: Config) -> Sizes:
    """Takes seconds and no memory, whatever the size. Raises UsageError for a run that would train nothing."""
    towers = {name: sketch_tower(config, name) for name in TOWERS}
    dims = {modality: towers[TOWER_OF[modality]].feature_dim for modality in MODALITIES}
    llama = _architecture(config)
    with torch.device("meta"):
        trained = {}
        for stage in STAGES:
            for name, run in getattr(config.stages, stage).items():
                groups = make_trainable(_build(config, llama, dims, sparse=stage == "tune"), run)
                parameters = sum(parameter.numel() for group in groups for parameter in group.parameters)
                trained[stage if name == stage else f"{stage}/{name}"] = parameters
        dense = total(_build(config, llama, dims, sparse=False).language)
        model = _build(config, llama, dims, sparse=True)
    return Sizes(
        language=total(model.language),
        active=active_per_token(model.language),
        dense=dense,
        experts=in_experts(model.language),
        connectors=_count_once(model.connectors),
        towers={name: total(tower) for name, tower in towers.items() if isinstance(tower, nn.Module)},
        trained=trained,
    )


def parameter_table(config: Config) -> list[str]:
    """``count_parameters`` as lines of text."""
    sizes, moe = count_parameters(config), config.model.moe
    experts = f"{moe.num_experts} experts, top {moe.top_k}, layers: {moe.layers}"
    if config.model.language.pretrained is None:
        experts += f"; at most {config.model.language.vocab_size} tokens in the vocabulary"
    towers = {name: getattr(config.model.towers, name).name for name in sizes.towers}
    rows = [
        ("parameters", "total", "active per token"),
        ("language model with routers", _short(sizes.language), f"{_short(sizes.active)}  ({experts})"),
        *(
            (f"connector: {modality}", _short(count), "" if count else "the image connector")
            for modality, count in sizes.connectors.items()
        ),
        *((f"tower: {name}, {towers[name]}", _short(count), "frozen") for name, count in sizes.towers.items()),
        *((f"trained in {run}", _short(count), "") for run, count in sizes.trained.items()),
    ]
    width = max(len(row[0]) for row in rows)
    return [f"{name:<{width}}  {count:>8}  {rest}".rstrip() for name, count, rest in rows]


def _architecture(config: Config) -> LlamaConfig:
    """Of the pretrained language model where it is on this machine, else as configured; nothing is downloaded."""
    language = config.model.language
    if language.pretrained is not None and Path(language.pretrained).is_dir():
        return pretrained_config(language)
    return llama_config(language, language.vocab_size)


def _count_once(connectors: nn.ModuleDict) -> dict[str, int]:
    seen: set[nn.Parameter] = set()
    counts = {}
    for modality, connector in connectors.items():
        own = set(connector.parameters()) - seen
        counts[modality] = sum(parameter.numel() for parameter in own)
        seen |= own
    return counts


def _build(config: Config, llama: LlamaConfig, dims: dict[str, int], *, sparse: bool) -> UniMoE:
    model = UniMoE(config.model, llama.vocab_size, dims, llama)
    if sparse:
        model.make_sparse()
    return model


def _short(count: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return str(count)
