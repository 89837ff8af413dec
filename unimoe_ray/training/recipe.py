"""What decides what a run learns. A model of another recipe is trained again; a state of another is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from unimoe_ray.config import Config
from unimoe_ray.data.plan import Order
from unimoe_ray.data.samples import SampleTable, Source
from unimoe_ray.training.checkpoint import ModelInfo
from unimoe_ray.training.stages import parents


def recipe(config: Config, stage: str, run: str, info: ModelInfo, source: Source) -> str:
    """A hash of all that decides what a run learns, earlier stages included."""
    parts = [stage, run, *_parts(config, stage, run, info, source).values()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def decisive(
    config: Config, stage: str, run: str, info: ModelInfo, source: Source, tasks: dict[str, float]
) -> dict[str, Any]:
    """The same in the open: JSON values by the keys of their settings, and hashes. ``tasks``: the mixture of those that
    there are samples of."""
    parts = _parts(config, stage, run, info, source)
    earlier = zip(parents(config, stage), parts.pop("earlier"), strict=True)
    about = parts.pop("model")
    tree = parts | {"model": about.pop("model"), "model of": about, "tasks with samples": tasks}
    return (
        dict(_leaves(tree))
        | {f"model of {before}/{name}": made_by for (before, name), made_by in earlier}
        | {"data plan": _last_samples(order_of(config, stage, run, tasks), source)}
    )


def order_of(config: Config, stage: str, run: str, tasks: dict[str, float]) -> Order:
    """What decides the samples of every step of a run."""
    settings = getattr(config.stages, stage)[run]
    seed, budget = run_seed(config, stage, run), (settings.steps, settings.epochs)
    return Order(tuple(tasks.items()), settings.batch_size, seed, *budget, settings.temperature)


def run_seed(config: Config, stage: str, run: str) -> int:
    """A seed of the run's own, the same on every rank."""
    return config.seed * 1000 + sum(map(ord, stage if stage == run else f"{stage}/{run}"))


def _last_samples(order: Order, source: Source) -> str:
    """A hash of the samples of the last step: they are others if those of any step are."""
    plan = order.plan(SampleTable(Path(source.samples)), source.spans)
    samples = plan.samples(plan.steps - 1)
    return hashlib.sha256(samples.astype("<i8").tobytes()).hexdigest()


def _parts(config: Config, stage: str, run: str, info: ModelInfo, source: Source) -> dict[str, Any]:
    samples = _file_hash(source.samples, Path(source.samples).stat().st_mtime_ns)
    earlier = [recipe(config, before, name, info, source) for before, name in parents(config, stage)]
    optimizer = config.training.optimizer.model_dump(mode="json")
    settings = getattr(config.stages, stage)[run].model_dump(mode="json")
    moe = config.model.moe.model_dump(mode="json") if stage == "tune" else None
    dense = replace(info, model={k: v for k, v in info.model.items() if k != "moe"})
    return {
        "seed": config.seed,
        f"stages.{stage}.{run}": settings,
        "training.optimizer": optimizer,
        "model.moe": moe,
        "model": asdict(dense),
        "prepared samples": samples,
        "earlier": earlier,
    }


def _leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict) or not tree:
        yield key, tree
        return
    for name, value in tree.items():
        yield from _leaves(value, f"{key}.{name}" if key else str(name))


@lru_cache(maxsize=4)
def _file_hash(path: str, changed_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
