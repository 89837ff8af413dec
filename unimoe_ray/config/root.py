"""The whole configuration: presets and files, ``key.sub=value`` overrides, and errors that name the nearest key."""

from __future__ import annotations

import difflib
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from unimoe_ray.config.base import Strict
from unimoe_ray.config.checkpoint import CheckpointConfig
from unimoe_ray.config.data import DataConfig, MiniConfig
from unimoe_ray.config.kubernetes import KubernetesConfig
from unimoe_ray.config.model import ModelConfig
from unimoe_ray.config.placement import PlacementConfig
from unimoe_ray.config.serving import ServingConfig
from unimoe_ray.config.training import STAGES, EvaluationConfig, StagesConfig, TrainingConfig
from unimoe_ray.errors import UnimoeError, UsageError

PRESETS = Path(__file__).parent / "presets"


class Config(Strict):
    """Everything a run needs. The run folder is ``runs_dir/name``."""

    name: str = Field("mini", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    runs_dir: str = "runs"
    seed: int = Field(0, ge=0)
    ray_address: str | None = Field(
        None, description="cluster to join; else RAY_ADDRESS of the environment, else one made here"
    )
    mini: MiniConfig = MiniConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    stages: StagesConfig = StagesConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    placement: PlacementConfig = PlacementConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    serving: ServingConfig = ServingConfig()
    kubernetes: KubernetesConfig = KubernetesConfig()

    @model_validator(mode="after")
    def _template_and_tokenizer_agree(self) -> Config:
        pretrained = self.model.language.pretrained
        template = self.data.template
        if template != "compact" and pretrained is None:
            raise ValueError(f"data.template is {template}, which needs the tokenizer of a model.language.pretrained")
        if template == "compact" and pretrained is not None:
            raise ValueError(
                "data.template is compact, whose tokenizer is trained on the data; model.language.pretrained has its "
                "own: set data.template to vicuna_v1 or smollm2"
            )
        return self

    @model_validator(mode="after")
    def _shared_connectors_are_trained_by_one_name(self) -> Config:
        if self.model.video_shares_image:
            for stage in STAGES:
                for name, run in getattr(self.stages, stage).items():
                    if "video" in run.connectors():
                        raise ValueError(
                            f"stages.{stage}.{name} trains connector.video, which is the image connector "
                            "(model.connectors.video=image): name connector.image"
                        )
        return self

    @model_validator(mode="after")
    def _best_needs_validations(self) -> Config:
        if self.checkpoint.keep_best and not self.training.validation.every:
            raise ValueError("checkpoint.keep_best goes by validation losses: set training.validation.every, too")
        return self

    @model_validator(mode="after")
    def _epochs_have_whole_weights(self) -> Config:
        by_epochs = any(run.epochs for stage in STAGES for run in getattr(self.stages, stage).values())
        for number, source in enumerate(self.data.sources):
            if by_epochs and source.weight != round(source.weight):
                raise ValueError(
                    f"data.sources.{number}.weight is {source.weight}; allowed with runs of epochs: whole numbers"
                )
        return self

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def suite_seed(self) -> int:
        return self.seed if self.mini.suite_seed is None else self.mini.suite_seed


def load(source: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """A preset by name, or a YAML file by path, with overrides such as ``training.workers=1``.

    Raises UsageError naming the key, its value and what is allowed.
    """
    tree = _read(source)
    for override in overrides:
        _apply(tree, override)
    return parse(tree)


def load_run(
    folder: Path, overrides: list[str] | tuple[str, ...] = (), changes: dict[str, Any] | None = None
) -> Config:
    """The configuration of an existing run, where it lies now; ``changes``: a tree of settings that differ.

    Raises UnimoeError when there is no such run, UsageError for a mistake in a setting.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UnimoeError(f"{folder}: no such run folder (it has no config.yaml)")
    tree = _merge(load(path, overrides).model_dump(mode="json"), changes or {})
    folder = folder.resolve()
    return parse(tree | {"name": folder.name, "runs_dir": str(folder.parent)})


def parse(tree: dict[str, Any]) -> Config:
    """Validate a configuration tree. Raises UsageError with one line for the first mistake."""
    _check_keys(tree, Config, "")
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first, *others = error.errors()
        key = _key(first, tree)
        # A value of several allowed types has one error for each of them.
        same = [first, *(e for e in others if _key(e, tree) == key)]
        message = "; ".join(e["msg"].removeprefix("Value error, ") for e in same)
        shown = "" if isinstance(first["input"], dict | BaseModel) else f" is {first['input']!r}"
        raise UsageError(f"{key or 'configuration'}{shown}: {message}") from None


def dump(config: Config) -> str:
    """The resolved configuration as YAML; ``load`` of it gives the same configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)


def _merge(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``changes`` over ``tree``, key by key at every depth."""
    merged = dict(tree)
    for key, value in changes.items():
        deeper = isinstance(value, dict) and isinstance(tree.get(key), dict)
        merged[key] = _merge(tree[key], value) if deeper else value
    return merged


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        path = PRESETS / f"{source}.yaml"
        if not path.is_file():
            names = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
            raise UsageError(f"--config {source}: no such preset; allowed: {names}, or the path of a .yaml file")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {source}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {source}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise UsageError(f"--config {source}: the file must hold keys and values, not {type(tree).__name__}")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"'{override}' is not an override; write key.sub=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"{key}: '{text}' is not a valid YAML value") from None
    *parents, last = _split_key(key)
    node = tree
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UsageError(f"{key}: '{part}' has no keys below it")
    node[last] = value


def _split_key(key: str) -> list[str]:
    """``stages.tune.tune.train.connector.image=...``: selectors under ``train`` contain dots themselves."""
    head, train, selector = key.partition(".train.")
    return [*head.split("."), "train", selector] if train else key.split(".")


def _key(error: Any, tree: Any) -> str:
    """The dotted key of a pydantic error. Below a value of several allowed types pydantic adds the type's name."""
    parts: list[str] = []
    for part in error["loc"]:
        inside = part in tree if isinstance(tree, dict) else isinstance(tree, list) and part in range(len(tree))
        if not inside and error["type"] != "missing":
            break
        parts.append(str(part))
        tree = tree[part] if inside else None
    return ".".join(parts)


def _check_keys(tree: Any, model: type[BaseModel], prefix: str) -> None:
    """Refuse unknown keys with the nearest valid one, before pydantic sees the tree."""
    if not isinstance(tree, dict):
        return
    for key, value in tree.items():
        if key not in model.model_fields:
            nearest = difflib.get_close_matches(str(key), model.model_fields, n=1, cutoff=0)
            raise UsageError(f"unknown key '{prefix}{key}'; did you mean '{prefix}{nearest[0]}'?")
        for kind in _models(model.model_fields[key].annotation):
            if isinstance(kind, tuple):
                for name, entry in value.items() if isinstance(value, dict) else ():
                    _check_keys(entry, kind[0], f"{prefix}{key}.{name}.")
            elif isinstance(value, list):
                for index, entry in enumerate(value):
                    _check_keys(entry, kind, f"{prefix}{key}.{index}.")
            else:
                _check_keys(value, kind, f"{prefix}{key}.")


def _models(annotation: Any) -> list[Any]:
    """Configuration models inside a field's type; a dict's value model comes as a 1-tuple."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    args = [a for a in get_args(annotation) if a is not NoneType]
    if getattr(annotation, "__origin__", None) is dict:
        return [(args[1],)] if isinstance(args[1], type) and issubclass(args[1], BaseModel) else []
    return [model for a in args for model in _models(a)]
