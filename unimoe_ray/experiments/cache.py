"""Outcomes of finished runs in one small file of JSON lines, so that figures can be made again without training.

A line is used only for a run that would learn and be asked the same: its recipe is a hash of all settings that decide
that, and the task suite, where it is on this machine, has to be the one that the run was made with. The code is not
part of it: after a change of how runs are trained, take the file away.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unimoe_ray.config import Config, load_run
from unimoe_ray.data.sources import absolute
from unimoe_ray.errors import UnimoeError
from unimoe_ray.experiments.outcomes import Outcome, read_outcome
from unimoe_ray.experiments.plan import Experiment
from unimoe_ray.mini.source import suite_dir

Run = tuple[str, int]  # arm and seed
DECISIVE = ("seed", "mini", "data", "model", "stages", "evaluation")


def outcome_recipe(config: Config, split: str) -> str:
    """Of what decides a run's outcome: not where its files lie, nor how many workers share its steps."""
    tree = config.model_copy(update={"data": absolute(config.data)}).model_dump(mode="json", include={*DECISIVE})
    tree["split"] = split
    tree["data"].pop("dir")
    tree["optimizer"] = config.training.optimizer.model_dump(mode="json")
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def finished(experiment: Experiment, split: str, cache: Path | None) -> dict[Run, Outcome]:
    """Outcomes of the runs in their folders, as far as they were configured as now, and of the rest those in the
    cache."""
    known = cached(experiment, split, cache)
    for run, config in experiment.runs().items():
        outcome = read_outcome(config, split)
        if outcome is not None and outcome_recipe(load_run(config.run_dir), split) == outcome_recipe(config, split):
            known[run] = outcome
    return {run: known[run] for run in experiment.runs() if run in known}


def cached(experiment: Experiment, split: str, cache: Path | None) -> dict[Run, Outcome]:
    """Raises UnimoeError naming a damaged line."""
    lines = {(line["arm"], line["seed"], line["recipe"]): line for line in _read(cache)}
    found = {}
    for (arm, seed), config in experiment.runs().items():
        line = lines.get((arm, seed, outcome_recipe(config, split)))
        if line is not None and _suite(config) in (None, line["suite"]):
            found[arm, seed] = _outcome(line)
    return found


def write_cache(cache: Path, experiment: Experiment, split: str, known: Mapping[Run, Outcome]) -> None:
    """Lines of these runs take the place of older ones; others stay."""
    configs = experiment.runs()
    lines = {(line["arm"], line["seed"], line["split"]): line for line in _read(cache)}
    for (arm, seed), outcome in known.items():
        config, old = configs[arm, seed], lines.get((arm, seed, split), {})
        suite = _suite(config) or old.get("suite")
        about = {"arm": arm, "seed": seed, "split": split, "recipe": outcome_recipe(config, split), "suite": suite}
        lines[arm, seed, split] = about | _plain(outcome)
    temporary = cache.with_name(f".{cache.name}")
    temporary.write_text("".join(json.dumps(lines[key]) + "\n" for key in sorted(lines)), encoding="utf-8")
    temporary.replace(cache)


def _plain(outcome: Outcome) -> dict[str, Any]:
    correct = {task: pack(right) for task, right in outcome.correct.items()}
    return {
        "correct": correct,
        "losses": list(outcome.losses),
        "seconds": outcome.seconds,
        "parameters": outcome.parameters,
        "active": outcome.active,
    }


def _outcome(line: Mapping[str, Any]) -> Outcome:
    correct = {task: unpack(text) for task, text in line["correct"].items()}
    return Outcome(correct, line["losses"], line["seconds"], line["parameters"], line["active"])


def pack(right: Sequence[bool]) -> str:
    """``5:13`` for right, wrong, wrong, right, right: how many, and their bits in hexadecimal."""
    bits = "".join("1" if answer else "0" for answer in right)
    return f"{len(right)}:{int(bits or '0', 2):x}"


def unpack(text: str) -> list[bool]:
    number, bits = text.split(":")
    return [bit == "1" for bit in f"{int(bits, 16):0{int(number)}b}"] if int(number) else []


def _read(cache: Path | None) -> list[dict[str, Any]]:
    if cache is None or not cache.is_file():
        return []
    lines = []
    for number, text in enumerate(cache.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            _outcome(line), line["arm"], line["seed"], line["split"], line["recipe"], line["suite"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UnimoeError(f"{cache}, line {number}: is damaged; take it out") from None
        lines.append(line)
    return lines


def _suite(config: Config) -> str | None:
    """The hash of the suite, if this run uses one and it is here."""
    path = suite_dir(config) / "suite.json"
    return json.loads(path.read_text())["hash"] if config.data.is_mini and path.is_file() else None
