"""What a run folder holds, read for its report. Missing and damaged parts are None, the damaged named in ``notes``."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from unimoe_ray.errors import UnimoeError
from unimoe_ray.report.history import RoutingHistory


@dataclass
class Curve:
    """The steps of one training run, as lists of equal length; ``planned`` is how many steps it was to have."""

    stage: str
    run: str
    planned: int = 0
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    worlds: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    routing: RoutingHistory = field(default_factory=RoutingHistory)
    validations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    goodput: float | None = None
    restarts: int = 0
    lost_steps: int = 0
    pauses: float = 0.0

    def add(self, record: dict[str, Any]) -> None:
        step = int(record["step"])
        if self.steps and step <= self.steps[-1]:
            self._go_back(step)
        tokens = int(record.get("tokens") or 0)
        rate = float(record.get("tokens_per_s") or 0)
        loss = record.get("loss")
        self.planned = max(self.planned, int(record.get("steps") or 0), step)
        self.steps.append(step)
        self.losses.append(float(loss) if loss is not None else math.nan)
        self.seconds.append(float(record.get("seconds") or (tokens / rate if rate else 0)))
        self.tokens.append(tokens)
        self.samples.append(int(record.get("samples") or 0))
        self.worlds.append(int(record.get("world") or 1))
        self.times.append(float(record.get("time") or 0))
        self.routing.add(step, record)
        if validation := record.get("validation"):
            losses = {str(group): float(loss) for group, loss in validation.items()}
            self.validations = [known for known in self.validations if known[0] < step] + [(step, losses)]
        if "goodput" in record:
            self.goodput = float(record["goodput"])
            self.restarts, self.lost_steps = int(record["restarts"]), int(record["lost_steps"])
        if written := record.get("checkpoint"):
            self.pauses += float(written["wait_s"]) + float(written["copy_s"])

    def _go_back(self, step: int) -> None:
        """A run that was stopped did its later steps again: only the last time counts."""
        keep = next(i for i, known in enumerate(self.steps) if known >= step)
        for values in (
            self.steps,
            self.losses,
            self.seconds,
            self.tokens,
            self.samples,
            self.worlds,
            self.times,
        ):
            del values[keep:]


@dataclass(frozen=True)
class RunData:
    """``config``, ``evaluation``, ``findings`` and ``events`` as in their files; ``quarantine`` counts by reason."""

    folder: Path
    config: dict[str, Any]
    curves: list[Curve]
    findings: list[dict[str, Any]]
    events: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    samples: list[dict[str, Any]]
    routing: dict[str, Any] | None
    analysis: dict[str, Any] | None
    quarantine: Counter[str]
    notes: list[str]

    @property
    def experts(self) -> list[str]:
        """What fills each expert slot, as the configuration or the routing report has it; [] if neither does."""
        tree: Any = self.config
        for key in ("model", "moe", "slots"):
            tree = tree.get(key) if isinstance(tree, dict) else None
        slots = (self.routing or {}).get("experts") or tree
        return [str(slot) for slot in slots] if isinstance(slots, list) else []


def read_run(folder: Path) -> RunData:
    """Raises UnimoeError if there is no such run folder."""
    if not folder.is_dir():
        raise UnimoeError(f"{folder}: no such run folder")
    known = ("config.yaml", "metrics.jsonl", "eval.json")
    if not any((folder / name).is_file() for name in known):
        raise UnimoeError(f"{folder}: not a run folder (none of {', '.join(known)} in it)")
    notes: list[str] = []
    try:
        return RunData(
            folder=folder,
            config=_config(folder / "config.yaml", notes),
            curves=_curves(folder / "metrics.jsonl", notes),
            findings=[f for f in _lines(folder / "findings.jsonl", notes) if _is_finding(f)],
            events=[e for e in _lines(folder / "events.jsonl", notes) if _is_event(e)],
            evaluation=_object(folder / "eval.json", _is_evaluation, notes),
            samples=[s for s in _lines(folder / "eval_samples.jsonl", notes) if _is_sample(s)],
            routing=_object(folder / "routing.json", _is_routing, notes),
            analysis=_object(folder / "analysis.json", lambda value: "soft_tokens" in value, notes),
            quarantine=Counter(str(r.get("reason", "no reason")) for r in _lines(folder / "quarantine.jsonl", notes)),
            notes=notes,
        )
    except OSError as error:
        raise UnimoeError(f"{error.filename or folder}: {error.strerror or error}") from error


def _config(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        notes.append(f"{path.name} is damaged and was left out.")
        return {}
    return tree if isinstance(tree, dict) else {}


def _curves(path: Path, notes: list[str]) -> list[Curve]:
    """One per run, in the order in which the runs began."""
    curves: dict[str, Curve] = {}
    for record in _lines(path, notes):
        run = str(record.get("run") or record.get("stage") or "run")
        curve = curves.setdefault(run, Curve(str(record.get("stage") or run.split("/")[0]), run))
        try:
            curve.add(record)
        except (KeyError, TypeError, ValueError, AttributeError):
            note = f"{path.name} has lines without a step or with values that are no numbers; they were left out."
            if note not in notes:
                notes.append(note)
    return [curve for curve in curves.values() if curve.steps]


def _lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Objects of a JSON-lines file; a half-written last line is silently left out, other damage is noted."""
    if not path.is_file():
        return
    damaged = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line)
                if isinstance(record, dict):
                    yield record
                    continue
            except ValueError:
                if not line.endswith(b"\n"):
                    continue
            damaged += 1
    if damaged:
        notes.append(f"{path.name}: {damaged} damaged {'line was' if damaged == 1 else 'lines were'} left out.")


def _object(path: Path, valid: Any, notes: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        value = None
    if isinstance(value, dict) and valid(value):
        return value
    notes.append(f"{path.name} is damaged and was left out.")
    return None


def _is_evaluation(value: dict[str, Any]) -> bool:
    tasks = value.get("tasks")
    return isinstance(tasks, dict) and all(
        isinstance(task, dict)
        and all(_is_share(task.get(key)) for key in ("accuracy", "majority"))
        and isinstance(task.get("n"), int)
        and task["n"] > 0
        for task in tasks.values()
    )


def _is_routing(value: dict[str, Any]) -> bool:
    load = value.get("load")
    return isinstance(load, dict) and all(
        isinstance(layers, list)
        and all(isinstance(layer, list) and layer and all(map(_is_share, layer)) for layer in layers)
        for layers in load.values()
    )


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_sample(value: dict[str, Any]) -> bool:
    return all(key in value for key in ("task", "question", "answer", "expected", "correct"))


def _is_finding(value: dict[str, Any]) -> bool:
    numbers = all(isinstance(value.get(key), int) for key in ("step", "since"))
    return numbers and all(isinstance(value.get(key), str) for key in ("run", "signature", "text"))


def _is_event(value: dict[str, Any]) -> bool:
    named = all(isinstance(value.get(key), str) for key in ("run", "event"))
    timed = isinstance(value.get("time"), int | float)
    return named and timed and (value["event"] != "recovered" or isinstance(value.get("seconds"), int | float))
