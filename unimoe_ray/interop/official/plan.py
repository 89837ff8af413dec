"""Where every tensor of a model comes from, decided from names and shapes alone, strictly.

The official code loads everything with ``strict=False``, so that its mistakes are silent. Here a tensor is used, or the
plan says why not; what is unknown or missing is an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unimoe_ray.errors import UnimoeError
from unimoe_ray.interop.official import names
from unimoe_ray.interop.official.files import EXPERT_FILES, Group
from unimoe_ray.interop.official.sizes import SLOTS_8E, Shapes, is_8e

_ADAPTER = re.compile(r"^(.+)\.lora_([AB])(?:\.default)?\.weight$")
_GATE_8E = re.compile(r"^model\.layers\.(\d+)\.mlp\.deepspeed_moe\.gate\.wg\.weight$")
_EXPERT_8E = re.compile(
    r"\.layers\.(\d+)\.mlp\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(\w+?_proj)(?:_lora_([AB]))?\.weight$"
)
_OF_4E = re.compile(r"\.mlp\.(experts\.\d+|gate)\.")
_MLP = re.compile(r"^model\.layers\.(\d+)\.mlp\.(\w+_proj)\.weight$")
_SLOTS_OF = {f"mlp_{file}": [n for n, name in enumerate(SLOTS_8E) if name == file] for file in EXPERT_FILES}
_ROUTER = re.compile(r"\.mlp\.gate$|\.gate\.wg$")


@dataclass(frozen=True)
class Origin:
    """A tensor in a file, and its shape."""

    path: Path
    name: str
    shape: tuple[int, ...]


@dataclass
class Lora:
    """``scale`` times B [out, r] @ A [r, in] is added to a weight [out, in]."""

    scale: float
    parts: dict[str, Origin] = field(default_factory=dict)


@dataclass
class Source:
    origin: Origin
    lora: Lora | None = None


@dataclass
class Plan:
    """sources: by our names; ignored: tensors of the files that the model does without, with the reason."""

    sources: dict[str, Source] = field(default_factory=dict)
    ignored: list[tuple[Origin, str]] = field(default_factory=list)

    def put(self, target: str, origin: Origin) -> None:
        if target in self.sources:
            self._replace(self.sources[target], f"replaced by that of {origin.path.name}")
        self.sources[target] = Source(origin)

    def add_lora(self, target: str, part: str, origin: Origin, scale: float) -> None:
        """Raises UnimoeError when there is no weight to add to."""
        source = self.sources.get(target)
        if source is None:
            raise UnimoeError(f"{origin.path}: {origin.name} adapts a weight that is in none of the files")
        source.lora = source.lora or Lora(scale)
        source.lora.parts[part] = origin

    def _replace(self, old: Source, reason: str) -> None:
        self.ignored += [(origin, reason) for origin in [old.origin, *(old.lora.parts.values() if old.lora else ())]]

    def share_projector(self) -> None:
        """Videos have the image connector's projector: its second names go."""
        for target in [name for name in self.sources if name.startswith(names.VIDEO)]:
            if self.sources[target] == self.sources.get(target.replace(names.VIDEO, names.IMAGE)):
                del self.sources[target]

    @property
    def shapes(self) -> Shapes:
        return {target: source.origin.shape for target, source in self.sources.items()}

    def report(self, unread: list[Path], fresh: list[str]) -> dict[str, Any]:
        """For ``import_report.json``: tensors used of each file, tensors ignored with reasons, files that were not
        read, and connectors that no file held."""
        used = [s.origin for s in self.sources.values()]
        used += [part for s in self.sources.values() if s.lora for part in s.lora.parts.values()]
        # An official tensor may fill several of ours, or be replaced in several places.
        filling = set(used)
        counts = Counter(_label(origin.path) for origin in filling)
        ignored = [(origin, reason) for origin, reason in dict.fromkeys(self.ignored) if origin not in filling]
        return {
            "used": dict(sorted(counts.items())),
            "ignored": [{"file": _label(o.path), "tensor": o.name, "reason": reason} for o, reason in ignored],
            "files_not_read": [_label(path) for path in unread],
            "new_connectors": fresh,
        }


def _label(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def make_plan(groups: list[tuple[Group, dict[Path, Shapes]]], config: Mapping[str, Any], adapter: dict) -> Plan:
    """``groups`` in load order, with the shapes in each of their files. adapter: ``adapter_config.json``.

    Raises UnimoeError for a tensor that is not known.
    """
    plan = Plan()
    for group, files in groups:
        known = {path: {name: names.strip_wrappers(name) for name in shapes} for path, shapes in files.items()}
        modality = names.aligner_modality(official for found in known.values() for official in found.values())
        for path, shapes in files.items():
            for name, shape in shapes.items():
                _place(plan, group, Origin(path, name, tuple(shape)), known[path][name], modality, config, adapter)
    for target, source in plan.sources.items():
        if source.lora and len(source.lora.parts) < 2:
            (part,) = source.lora.parts.values()
            raise UnimoeError(f"{part.path}: {part.name} has no counterpart (for {target})")
    return plan


def _place(
    plan: Plan, group: Group, origin: Origin, name: str, modality: str | None, config: Mapping, adapter: dict
) -> None:
    eight = is_8e(config)
    if reason := names.why_ignored(name):
        plan.ignored.append((origin, reason))
        return
    if group.kind in ("mm_projector", "mm_video_projector", "non_lora_trainables") and "mm_projector." in name:
        name = names.PROJECTOR + name.partition("mm_projector.")[2]
    if match := _ADAPTER.match(name):
        weight, part = match.groups()
        if _ROUTER.search(weight):
            reason = "a router's adapter, which the official inference discards: mlp_gates is loaded after it"
            plan.ignored.append((origin, reason))
            return
        plan.add_lora(f"language.{weight}.weight", part, origin, _adapter_scale(adapter, origin))
        return
    if eight and group.kind == "base" and _OF_4E.search(name):
        plan.ignored.append((origin, "of the 4-expert base; the 8 experts and their router have files of their own"))
        return
    for target in _targets(group, name, modality, config, origin):
        if isinstance(target, tuple):
            plan.add_lora(target[0], target[1], origin, config.get("lora_alpha", 16) / config.get("lora_r", 8))
        else:
            plan.put(target, origin)


def _targets(
    group: Group, name: str, modality: str | None, config: Mapping, origin: Origin
) -> list[str | tuple[str, str]]:
    """Our names of a tensor; (name, A or B) of a part of an adapter."""
    found: list[str | tuple[str, str]] = []
    if match := _GATE_8E.match(name):
        found = [f"language.model.layers.{match[1]}.mlp.gate.weight"]
    elif match := _EXPERT_8E.search(name):
        # Files are numbered by rank, experts in a file from 0.
        expert = group.number * (config["num_experts"] // config.get("ep_size", config["num_experts"])) + int(match[2])
        target = f"language.model.layers.{match[1]}.mlp.experts.{expert}.{match[3]}.weight"
        found = [(target, match[4]) if match[4] else target]
    elif (filled := _SLOTS_OF.get(group.kind)) and (match := _MLP.match(name)):
        found = [f"language.model.layers.{match[1]}.mlp.experts.{slot}.{match[2]}.weight" for slot in filled]
    else:
        found = list(names.ours(name, modality))
        if group.kind == "mm_video_projector":
            found = found[1:]
    if not found:
        raise UnimoeError(f"{origin.path}: {origin.name} is not a tensor of an official checkpoint")
    return found


def _adapter_scale(adapter: dict, origin: Origin) -> float:
    if not adapter:
        raise UnimoeError(f"{origin.path}: needs adapter_config.json beside it (r and lora_alpha)")
    for key in ("use_rslora", "use_dora", "fan_in_fan_out"):
        if adapter.get(key):
            raise UnimoeError(f"adapter_config.json: {key} is not supported")
    return adapter["lora_alpha"] / adapter["r"]


def check(plan: Plan, wanted: Shapes, eight: bool) -> None:
    """Raises UnimoeError for tensors that no file has (naming the file they should be in), do not exist in the model,
    or have another shape."""
    for target, source in plan.sources.items():
        if target not in wanted:
            raise UnimoeError(f"{source.origin.path}: {source.origin.name} has no place in the model of config.json")
        found, expected = source.origin.shape, tuple(wanted[target])
        if found != expected:
            raise UnimoeError(f"{source.origin.path}: {source.origin.name} is {found}, not {expected}")
        if source.lora:
            a, b = source.lora.parts["A"], source.lora.parts["B"]
            if (b.shape[0], a.shape[1]) != expected or a.shape[0] != b.shape[1]:
                raise UnimoeError(f"{a.path}: {a.name} {a.shape} and B {b.shape} do not fit {expected}")
    missing = [target for target in wanted if target not in plan.sources]
    if missing:
        files = sorted({_file_of(target, eight) for target in missing})
        first = names.official(missing[0])
        raise UnimoeError(f"{len(missing)} tensors are missing, such as {first}; they should be in {', '.join(files)}")


def _file_of(target: str, eight: bool) -> str:
    """The file that should hold one of our tensors."""
    if target.startswith(("connectors.image.", "connectors.video.")):
        return "mm_projector.bin"
    if target.startswith("connectors."):
        return "mm_audio_aligner.bin"
    if ".mlp.gate." in target:
        return "mlp_gates.bin"
    if eight and (match := re.search(r"\.experts\.(\d+)\.", target)):
        return f"mlp_{SLOTS_8E[int(match[1]) % len(SLOTS_8E)]}.bin"
    return "pytorch_model-*.bin"
