"""``unimoe plan-experts``: where experts would lie, from a recorded run, from given loads, or with equal ones."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unimoe_ray import config as configuration
from unimoe_ray.config import Config
from unimoe_ray.errors import UnimoeError, UsageError
from unimoe_ray.parallel.placement import plan
from unimoe_ray.parallel.placement_cost import Work, flows
from unimoe_ray.parallel.placement_table import Summary, explain
from unimoe_ray.parallel.topology import Array, Loads, Placement, Topology, readers_of

# A placement is for what comes next: the last steps say it best.
LAST_STEPS = 100


@dataclass(frozen=True)
class Planned:
    """What was planned, and what it was planned from."""

    placement: Placement
    loads: Loads
    topology: Topology
    work: Work
    origin: str

    def as_json(self) -> dict[str, Any]:
        summary = Summary.of(flows(self.placement, self.loads, self.topology), self.topology, self.work)
        return {
            "loads": self.origin,
            "ranks": self.topology.ranks,
            "nodes": list(self.topology.nodes),
            "slots": list(self.topology.slots),
            **asdict(summary),
            "layers": self.placement.layers,
        }

    def lines(self) -> list[str]:
        return [f"loads: {self.origin}", "", *explain(self.placement, self.loads, self.topology, self.work)]


def plan_experts(
    words: Sequence[str],
    preset: str,
    *,
    ranks: int,
    nodes: int,
    slots: int | None = None,
    replicas: bool = False,
    reads: Sequence[str] = (),
) -> Planned:
    """words: at most one run folder, metrics.jsonl or JSON file of loads ([L][E] or {kind: [L][E]}), and overrides
    ``key.sub=value``; preset: whose sizes count where a file has no configuration beside it; reads: ``NODE=KIND,KIND``.

    Raises UsageError and UnimoeError with one line.
    """
    overrides = [word for word in words if "=" in word and not Path(word).exists()]
    sources = [Path(word) for word in words if word not in overrides]
    if len(sources) > 1:
        raise UsageError(f"'{sources[1]}' is one source too many; give one run folder or file")
    for name, value in (("--ranks", ranks), ("--nodes", nodes), ("--slots", slots)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; allowed: from 1")
    settings, tokens, origin = _loads(sources[0] if sources else None, preset, overrides)
    experts = next(iter(tokens.values())).shape[1]
    rules = settings.placement
    each = slots if slots is not None else rules.slots_per_rank(experts, ranks)
    topology = Topology.even(ranks, nodes, each, **rules.link_costs())
    loads = Loads.by_modality(
        np.stack(list(tokens.values()), axis=1),
        readers_of(list(tokens), topology, _reads(reads, list(tokens), nodes)),
        list(tokens),
    )
    language = settings.model.language
    work = Work.of(language.hidden_size, language.intermediate_size, tflops=rules.tflops)
    return Planned(plan(loads, topology, replicas=replicas, slack=rules.slack), loads, topology, work, origin)


def _loads(source: Path | None, preset: str, overrides: list[str]) -> tuple[Config, dict[str, Array], str]:
    """Tokens [L, E] by kind, of a step, and in words where they are from."""
    if source is None:
        settings = configuration.load(preset, overrides)
        moe = settings.model.moe
        layers = len(moe.sparse_layers(settings.model.language.num_layers))
        if layers == 0:
            raise UsageError("model.moe.layers is 'none': the model has no mixture of experts")
        return settings, {"all": np.ones((layers, moe.num_experts))}, f"none given, equal for all experts of '{preset}'"
    if not source.exists():
        raise UnimoeError(f"{source}: no such run folder or file")
    folder = source if source.is_dir() else source.parent
    beside = folder / "config.yaml"
    settings = configuration.load_run(folder, overrides) if beside.is_file() else configuration.load(preset, overrides)
    if source.suffix == ".json":
        return settings, _given(source), str(source)
    metrics = source / "metrics.jsonl" if source.is_dir() else source
    if not metrics.is_file():
        raise UnimoeError(f"{metrics}: no such file; the run has not trained yet")
    return settings, *recorded(metrics)


def recorded(metrics: Path) -> tuple[dict[str, Array], str]:
    """Tokens [L, E] by kind of the last run in a ``metrics.jsonl`` with a mixture: the mean of its last steps."""
    lines, found = [], False
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # half-written, by a run that was killed
        found = True
        if isinstance(record, dict) and (record.get("expert_tokens") or record.get("expert_load")):
            lines.append(record)
    if not found:
        raise UnimoeError(f"{metrics}: no steps in it")
    if not lines:
        raise UnimoeError(f"{metrics}: no step of a mixture in it (no expert_load); only stage tune has one")
    label = lines[-1].get("run")
    lines = [line for line in lines if line.get("run") == label][-LAST_STEPS:]
    if all(line.get("expert_tokens") for line in lines):
        kinds = list(dict.fromkeys(kind for line in lines for kind in line["expert_tokens"]))
        parts = {
            kind: [line["expert_tokens"][kind] for line in lines if kind in line["expert_tokens"]] for kind in kinds
        }
    else:
        parts = {
            "all": [
                _times(line["expert_load"], line.get("tokens") or 1, metrics)
                for line in lines
                if line.get("expert_load")
            ]
        }
    tokens = {
        kind: sum(_matrix(part, metrics) for part in kind_parts) / len(lines) for kind, kind_parts in parts.items()
    }
    return tokens, f"{metrics}, run {label}, steps {lines[0].get('step')} to {lines[-1].get('step')}"


def _times(shares: Any, tokens: float, path: Path) -> Array:
    return _matrix(shares, path) * tokens


def _given(path: Path) -> dict[str, Array]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UsageError(f"{path}: not JSON") from None
    tokens = (
        {str(k): _matrix(v, path) for k, v in value.items()}
        if isinstance(value, dict)
        else {"all": _matrix(value, path)}
    )
    if not tokens or len({matrix.shape for matrix in tokens.values()}) > 1:
        raise UsageError(f"{path}: all kinds need loads of the same layers and experts")
    return tokens


def _matrix(value: Any, path: Path) -> Array:
    try:
        matrix = np.array(value, dtype=np.float64)
    except (ValueError, TypeError):
        matrix = np.empty(0)
    if matrix.ndim != 2 or 0 in matrix.shape or not all(math.isfinite(x) and x >= 0 for x in matrix.flat):
        raise UsageError(f"{path}: loads are not [layers][experts] numbers from 0")
    return matrix


def _reads(given: Sequence[str], kinds: list[str], count: int) -> dict[int, tuple[str, ...]]:
    """``2=image,video``: node 2 reads images and videos."""
    nodes = {}
    for text in given:
        node, equals, named = text.partition("=")
        if not equals or not node.isdigit() or not named:
            raise UsageError(f"--reads {text}: write NODE=KIND or NODE=KIND,KIND, such as 0=image,video")
        if int(node) >= count:
            raise UsageError(f"--reads {text}: node {node} does not exist; allowed: 0 to {count - 1}")
        if unknown := [kind for kind in named.split(",") if kind not in kinds]:
            raise UsageError(f"--reads {text}: no loads of '{unknown[0]}'; allowed: {', '.join(kinds)}")
        nodes[int(node)] = tuple(named.split(","))
    return nodes
