"""States of a run for people: tables for the terminal, and the same as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import prod
from typing import Any

from rich.markup import escape
from rich.table import Table

from unimoe_ray.checkpoint.manifest import KINDS, Manifest, UncommittedError
from unimoe_ray.checkpoint.states import State, damages, kept, newest_first, states_folder, strangers
from unimoe_ray.checkpoint.storage import Folder
from unimoe_ray.config import Config
from unimoe_ray.config.training import STAGES
from unimoe_ray.data.locations import reason
from unimoe_ray.errors import UnimoeError, UsageError


@dataclass(frozen=True)
class Listed:
    """A state by its name in the run, committed or not. why: it is kept; problem: why it does not count."""

    name: str
    folder: Folder
    state: State | None
    why: list[str]
    problem: str | None = None
    damaged: bool = False


def states_of(config: Config) -> list[Listed]:
    """Of all runs of all stages, the newest of each first. Raises UnimoeError where the storage can't be read."""
    result = []
    for stage in STAGES:
        for run in getattr(config.stages, stage):
            folder = states_folder(config, stage, run)
            try:
                found = list(newest_first(folder))
            except OSError as error:
                raise UnimoeError(f"{folder.location}: {reason(error)}") from None
            result += _listed(folder, found, config)
    return result


def _listed(folder: Folder, found: Sequence[Any], config: Config) -> Iterator[Listed]:
    manifests = {one.step: one.manifest for one in found if isinstance(one, State)}
    losses = {step: made.validation for step, made in manifests.items() if made.validation is not None}
    why = kept(sorted(manifests), losses, config.checkpoint)
    for one in found:
        if isinstance(one, State):
            yield Listed(f"{folder.name}/{one.folder.name}", one.folder, one, why.get(one.step, []))
        else:
            where, error = one
            damaged = not isinstance(error, UncommittedError)
            yield Listed(f"{folder.name}/{where.name}", where, None, [], str(error), damaged)


def choose(found: Sequence[Listed], name: str | None) -> State:
    """The newest state that was committed, of those whose name begins so. Raises UsageError when there is none."""
    states = [one.state for one in found if one.state is not None and one.name.startswith(name or "")]
    if not states:
        names = ", ".join(one.name for one in found if one.state is not None) or "none: no run has a committed state"
        raise UsageError(f"there is no state '{name or ''}'; allowed: {names}")
    return max(states, key=lambda state: state.manifest.time)


def summary(one: Listed) -> dict[str, Any]:
    answer: dict[str, Any] = {"name": one.name, "location": one.folder.location, "committed": one.state is not None}
    if one.state is None:
        return answer | {"problem": one.problem}
    made = one.state.manifest
    facts = {"step": made.step, "steps": made.steps, "time": made.time, "bytes": made.bytes, "workers": made.world}
    return answer | facts | {"validation": made.validation, "kept": one.why}


def verify(one: Listed) -> dict[str, Any]:
    """Reads every file. damages: what is wrong, each named; remarks: what does no harm."""
    answer: dict[str, Any] = {"name": one.name, "committed": one.state is not None, "damages": [], "remarks": []}
    if one.state is None:
        answer["damages" if one.damaged else "remarks"].append(one.problem)
        return answer
    try:
        answer["damages"] = damages(one.state)
        answer["remarks"] = [f"{name} is no file of it" for name in strangers(one.state)]
    except OSError as error:
        raise UnimoeError(f"{one.folder.location}: {reason(error)}") from None
    return answer


def verdicts(checked: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each damage and remark, and one for each state that is whole."""
    lines = []
    for one in checked:
        told = [f"DAMAGED  {one['name']}: {damage}" for damage in one["damages"]]
        told += [f"         {one['name']}: {remark}" for remark in one["remarks"]]
        if one["committed"] and not one["damages"]:
            told.insert(0, f"good     {one['name']}")
        lines += told
    return [escape(line) for line in lines] or ["there is no state: no run was interrupted"]


def contents(state: State) -> dict[str, Any]:
    """The manifest without its checksums."""
    made = state.manifest
    facts = made.model_dump(
        mode="json", include={"label", "step", "steps", "updates", "time", "placement", "validation"}
    )
    return (
        {"location": state.folder.location}
        | facts
        | {
            "workers": made.world,
            "bytes": made.bytes,
            "dtype": "float32",
            "tensors": list(KINDS),
            "parameters": made.parameters,
            "parts": [
                {"name": part.name, "bytes": part.bytes, "fragments": len(part.fragments)} for part in made.parts
            ],
            "decides": made.decides,
        }
    )


def states_table(name: str, found: Sequence[Listed]) -> Table:
    table = _table(f"{name}: states to go on from", "state", "step", "made (UTC)", "size", "workers", "kept for")
    for one in found:
        if one.state is None:
            table.add_row(escape(one.name), "", "", "", "", escape(one.problem or ""))
            continue
        made = one.state.manifest
        facts = f"{made.step} of {made.steps}", _time(made), size(made.bytes), str(made.world)
        table.add_row(escape(one.name), *facts, ", ".join(one.why) or "nothing: goes with the next")
    if not found:
        table.caption = "none: finished runs leave models, and none is unfinished here"
    return table


def position_table(state: State) -> Table:
    made = state.manifest
    values = sum(prod(shape) for shape in made.parameters.values())
    rows = {
        "location": state.folder.location,
        "run": made.label,
        "made (UTC)": _time(made),
        "steps done": f"{made.step} of {made.steps} (data plan and schedule go on from there)",
        "updates of Adam": str(made.updates),
        "validation loss": "none at this step" if made.validation is None else f"{made.validation:.4f}",
        "written by": f"{made.world} worker{'s' if made.world != 1 else ''}, {size(made.bytes)}",
        "parameters": f"{len(made.parameters)} with {values:,} values, float32, each with exp_avg and exp_avg_sq",
        "experts": "all on every worker" if made.placement is None else _placement(made.placement),
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in rows.items():
        table.add_row(key, escape(value))
    return table


def parameters_table(state: State) -> Table:
    table = _table(None, "parameter", "shape", "values", "in parts")
    where: dict[str, list[int]] = {}
    for number, part in enumerate(state.manifest.parts):
        for name, *_ in part.fragments:
            where.setdefault(name, []).append(number)
    for name, shape in state.manifest.parameters.items():
        extents = " x ".join(map(str, shape)) or "scalar"
        table.add_row(escape(name), extents, f"{prod(shape):,}", ", ".join(map(str, where.get(name, []))))
    return table


def size(count: int) -> str:
    """Bytes as a person reads them."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def _table(title: str | None, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="left" if name == others[-1] else "right")
    return table


def _placement(layers: list[list[list[int]]]) -> str:
    """Layers that are placed alike in one line."""
    lines: list[tuple[int, int, list[list[int]]]] = []
    for number, ranks in enumerate(layers, start=1):
        if lines and lines[-1][2] == ranks:
            lines[-1] = lines[-1][0], number, ranks
        else:
            lines.append((number, number, ranks))
    return "\n".join(
        f"layer{f' {a}' if a == b else f's {a} to {b}'}: " + " | ".join(" ".join(map(str, ids)) or "-" for ids in ranks)
        for a, b, ranks in lines
    )


def _time(made: Manifest) -> str:
    return datetime.fromtimestamp(made.time, UTC).strftime("%Y-%m-%d %H:%M:%S")
