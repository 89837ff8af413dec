"""What each stage starts from, trains, and leaves behind.

| stage   | starts from                  | trains                                                   |
|---------|------------------------------|----------------------------------------------------------|
| base    | nothing (or a LLaMA)         | the language model                                       |
| align   | base                         | connectors                                               |
| experts | align                        | feed-forward LoRA and connectors, one run per expert     |
| tune    | align + experts in slots     | LoRA on attention and experts, router, projections       |
"""

from __future__ import annotations

import re
import warnings

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model

from unimoe_ray.config import Config
from unimoe_ray.config.training import STAGES, LoraConfig, TrainRun
from unimoe_ray.errors import UsageError
from unimoe_ray.llama import checkpoint_of
from unimoe_ray.model.connectors import read_connectors
from unimoe_ray.model.language import mixtures, place_expert
from unimoe_ray.model.unimoe import UniMoE
from unimoe_ray.training.checkpoint import ModelInfo, checkpoint_dir, load_weights, read_weights
from unimoe_ray.training.engine import Group

_TARGETS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "feed_forward": ("gate_proj", "up_proj", "down_proj"),
}


def parents(config: Config, stage: str) -> list[tuple[str, str]]:
    """(stage, run) of the checkpoints that a stage starts from."""
    before = STAGES[: STAGES.index(stage)]
    if stage == "tune" and config.model.moe.init == "copies":
        before = [s for s in before if s != "experts"]
    trained = [s for s in before if getattr(config.stages, s)]
    wanted = trained[-2:] if stage == "tune" and "experts" in trained else trained[-1:]
    return [(s, run) for s in wanted for run in getattr(config.stages, s)]


def start_model(config: Config, info: ModelInfo, stage: str) -> UniMoE:
    """The model at the start of a stage, from the checkpoints of those before. ``info`` describes a dense model."""
    before = [(s, run) for s, run in parents(config, stage) if s != "experts"]
    pretrained = None if before else config.model.language.pretrained
    model = info.build(pretrained=pretrained and checkpoint_of(pretrained))
    if not before:
        read_connectors(model.connectors, model.config)
    for number, (s, run) in enumerate(before):
        folder = checkpoint_dir(config.run_dir, s, run)
        if number == 0:
            load_weights(model, folder)
        else:
            _load_connectors(model, getattr(config.stages, s)[run], read_weights(folder))
    if stage == "align":
        model.match_text_rms()
    if stage == "tune":
        model.make_sparse()
        if config.model.moe.init == "experts":
            _place_experts(config, model)
    return model


def _place_experts(config: Config, model: UniMoE) -> None:
    """Experts of stage 2 into their slots, and each connector from the run that trained it."""
    runs = config.stages.experts
    unknown = [slot for slot in config.model.moe.slots if slot != "base" and slot not in runs]
    if unknown:
        allowed = ", ".join(["base", *runs])
        raise UsageError(
            f"model.moe.slots names '{unknown[0]}', which no run of stages.experts trains; allowed: {allowed}"
        )
    for name, run in runs.items():
        weights = read_weights(checkpoint_dir(config.run_dir, "experts", name))
        language = {k.removeprefix("language."): v for k, v in weights.items() if k.startswith("language.")}
        for slot, wanted in enumerate(config.model.moe.slots):
            if wanted == name:
                place_expert(model.language, slot, language)
        _load_connectors(model, run, weights)


def _load_connectors(model: UniMoE, run: TrainRun, weights: dict[str, torch.Tensor]) -> None:
    """The connectors that a run trained, out of its checkpoint: independent runs each own theirs."""
    for modality in run.connectors():
        prefix = f"connectors.{modality}."
        state = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        model.connectors[modality].load_state_dict(state)


def make_trainable(model: UniMoE, run: TrainRun) -> list[Group]:
    """Freeze everything but what the run trains, add LoRA, and return the parameter groups."""
    model.requires_grad_(False)
    if run.lora is not None:
        add_lora(model, run.lora)
    groups = []
    for selector, lr in run.train.items():
        parameters = _select(model, selector)
        if not parameters:
            raise UsageError(f"train selector '{selector}' matches no parameters of this stage's model")
        for parameter in parameters:
            parameter.requires_grad_(True)
        groups.append(Group(selector, parameters, lr))
    seen: set[int] = set()
    for group in groups:
        if seen & {id(p) for p in group.parameters}:
            raise UsageError(f"train selector '{group.name}' overlaps another one")
        seen |= {id(p) for p in group.parameters}
    return groups


def add_lora(model: UniMoE, lora: LoraConfig) -> None:
    """peft LoRA adapters on the language model's attention and feed-forward projections, experts included."""
    names = "|".join(name for target in lora.targets for name in _TARGETS[target])
    settings = PeftLoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=rf".*\.({names})", bias="none"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        warnings.filterwarnings("ignore", category=FutureWarning)  # between peft and transformers
        model.language = get_peft_model(model.language, settings)


def merge_lora(model: UniMoE) -> None:
    """Fold the adapters into the weights; the language model is a plain one again."""
    model.language = model.language.merge_and_unload()


def _select(model: UniMoE, selector: str) -> list[torch.nn.Parameter]:
    if selector == "language":
        return list(model.language.parameters())
    if selector == "lora":
        return [p for name, p in model.language.named_parameters() if ".lora_" in name]
    if selector == "router":
        return [layer.gate.weight for layer in mixtures(model)]
    if selector == "feed_forward":
        pattern = re.compile(r"\.mlp\.(experts\.\d+\.)?(gate|up|down)_proj\.(base_layer\.)?weight$")
        return [p for name, p in model.language.named_parameters() if pattern.search(name)]
    _, modality, *part = selector.split(".")
    connector = model.connectors[modality]
    return list((connector.projection if part else connector).parameters())
