"""What a finished run of an experiment left behind."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from unimoe_ray.config import Config
from unimoe_ray.experiments.plan import evaluation_dir, metrics
from unimoe_ray.model.sizes import active_per_token, total
from unimoe_ray.training.checkpoint import ModelInfo, checkpoint_dir

DIGITS = 4  # of a loss


@dataclass(frozen=True)
class Outcome:
    """One finished run. correct: by task, of each question in the split's order; losses: of stage 3, by step; seconds:
    of its steps; parameters, active: of the language model, all and those that one token passes. 0: not known."""

    correct: Mapping[str, Sequence[bool]]
    losses: Sequence[float]
    seconds: float = 0.0
    parameters: int = 0
    active: int = 0

    def accuracy(self, tasks: Sequence[str] | None = None) -> float:
        """Mean over tasks (those of these that were asked)."""
        asked = [task for task in self.correct if tasks is None or task in tasks]
        return statistics.fmean(statistics.fmean(self.correct[task]) for task in asked)


Seed = Mapping[str, Outcome]


def read_outcome(config: Config, split: str) -> Outcome | None:
    """None for a run that is not finished."""
    path = evaluation_dir(config, split) / "eval_samples.jsonl"
    if not path.is_file():
        return None
    correct: dict[str, list[bool]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        correct.setdefault(sample["task"], []).append(sample["correct"])
    steps = [line for line in metrics(config) if line["stage"] == "tune"]
    losses = [float(f"{line['loss']:.{DIGITS}g}") for line in steps]
    seconds = round(sum(line["seconds"] for line in steps), 1)
    return Outcome(correct, losses, seconds, *_sizes(config))


def _sizes(config: Config) -> tuple[int, int]:
    path = checkpoint_dir(config.run_dir, "tune", "tune") / "config.json"
    if not path.is_file():
        return 0, 0
    with torch.device("meta"):
        language = ModelInfo(**json.loads(path.read_text(encoding="utf-8"))).build().language
    return total(language), active_per_token(language)
