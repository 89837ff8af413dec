"""Evaluation of a run's model on a held-out split, sharded over Ray tasks."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch

from unimoe_ray.config import Config
from unimoe_ray.config.training import STAGES
from unimoe_ray.data import prepare
from unimoe_ray.data.loader import read_features
from unimoe_ray.data.samples import SampleTable, Source
from unimoe_ray.data.schema import PLACEHOLDER
from unimoe_ray.errors import UnimoeError, UsageError
from unimoe_ray.evaluation.answer import answer, expert_load
from unimoe_ray.evaluation.metrics import exact_match, task_score
from unimoe_ray.evaluation.tokens import write_token_routing
from unimoe_ray.training.checkpoint import checkpoint_dir, is_complete, load_info, load_model

ROUTING_SAMPLES = 60
# Evaluated besides ``evaluation.tasks`` where the machine had the packages for them.
OPTIONAL_TASKS = ("real_digits", "fashion")


@dataclass(frozen=True)
class Evaluation:
    """tasks: {name: {accuracy, majority, n}}; samples: one object per answer; routing: see ``routing.json``."""

    tasks: dict[str, dict[str, float | int]]
    samples: list[dict[str, Any]]
    routing: dict[str, Any] | None


def final_model(config: Config, stage: str | None = None) -> Path:
    """The folder of the last finished stage's model (or of ``stage``). Raises UnimoeError if there is none."""
    names = [stage] if stage else list(reversed(STAGES))
    for name in names:
        for run in getattr(config.stages, name) if name != "experts" else ():
            folder = checkpoint_dir(config.run_dir, name, run)
            if is_complete(folder):
                return folder
    raise UnimoeError(
        f"{config.run_dir}: no finished model in {config.run_dir / 'checkpoints'}; run 'unimoe train all' first"
    )


def evaluate(
    config: Config,
    *,
    model_dir: Path,
    split: str = "test",
    tasks: list[str] | None = None,
    shards: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
    routing_file: Path | None = None,
) -> Evaluation:
    """Greedy answers of every evaluated task, scored by exact match.

    routing_file: for the experts of every token of the prompts (``evaluation.tokens.schema``)
    """
    source = prepare.source(config, split)
    table = SampleTable(Path(source.samples))
    chosen = _choose(config, table.by_task(), tasks)
    rows = {task: [int(row) for row in indices] for task, indices in chosen.items()}
    flat = sorted((row for task_rows in rows.values() for row in task_rows), key=lambda row: int(table.lengths[row]))
    if routing_file is not None:
        model, _, tokenizer = load_model(model_dir)
        prompts = [table.get(row) for row in flat]
        batch_size = config.evaluation.batch_size
        write_token_routing(
            routing_file, model, tokenizer, prompts, partial(read_features, source), batch_size=batch_size
        )
    size = max(config.evaluation.batch_size, -(-len(flat) // (8 * shards)))
    parts = [flat[i : i + size] for i in range(0, len(flat), size)]
    remote = ray.remote(num_cpus=1)(_answer_rows)
    pending = {
        remote.remote(
            str(model_dir), source, part, config.evaluation.batch_size, config.evaluation.max_new_tokens
        ): part
        for part in parts
    }
    answers: dict[int, str] = {}
    while pending:
        (ready, *_), _ = ray.wait(list(pending), num_returns=1)
        part = pending.pop(ready)
        answers |= zip(part, ray.get(ready), strict=True)
        if on_progress:
            on_progress(len(answers), len(flat))

    asked = prepare.held_out_records(config, split, {row for task_rows in rows.values() for row in task_rows})
    scores, samples = {}, []
    for task, task_rows in rows.items():
        expected = []
        for row in task_rows:
            expected.append(asked[row]["answer"])
            samples.append(_describe(asked[row], answers[row]))
        scores[task] = task_score([answers[row] for row in task_rows], expected)
    return Evaluation(scores, samples, _routing(model_dir, source, rows, config.evaluation.batch_size))


def write_evaluation(run_dir: Path, result: Evaluation, stamp: dict[str, Any]) -> None:
    """eval.json, eval_samples.jsonl and routing.json of a run folder."""
    lines = "".join(json.dumps(sample) + "\n" for sample in result.samples)
    (run_dir / "eval_samples.jsonl").write_text(lines, encoding="utf-8")
    if result.routing:
        (run_dir / "routing.json").write_text(json.dumps(result.routing, indent=1), encoding="utf-8")
    temporary = run_dir / ".eval.json"
    temporary.write_text(json.dumps({"tasks": result.tasks} | stamp, indent=1), encoding="utf-8")
    temporary.replace(run_dir / "eval.json")


def _choose(config: Config, known: dict[str, Any], tasks: list[str] | None) -> dict[str, Any]:
    named = config.evaluation.tasks
    wanted = tasks or ([*named, *(t for t in OPTIONAL_TASKS if t in known)] if named else list(known))
    for task in wanted:
        if task not in known:
            raise UsageError(f"task '{task}' has no held-out samples; allowed: {', '.join(sorted(known))}")
    limit = config.evaluation.limit
    return {task: known[task][:limit] for task in wanted}


def _answer_rows(model_dir: str, source: Source, rows: list[int], batch_size: int, max_new_tokens: int) -> list[str]:
    """A Ray task: answers for some rows of a prepared split."""
    torch.set_num_threads(1)
    model, _, tokenizer = load_model(Path(model_dir))
    table = SampleTable(Path(source.samples))
    prompts = [table.get(row) for row in rows]
    return answer(
        model,
        tokenizer,
        prompts,
        lambda name: read_features(source, name),
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )


def _routing(model_dir: Path, source: Source, rows: dict[str, list[int]], batch_size: int) -> dict[str, Any] | None:
    if not load_info(model_dir).sparse:
        return None
    model, info, _ = load_model(model_dir)
    table = SampleTable(Path(source.samples))
    chooser = random.Random(0)
    prompts = [
        table.get(row) for part in rows.values() for row in chooser.sample(part, min(ROUTING_SAMPLES, len(part)))
    ]
    load = expert_load(model, prompts, lambda name: read_features(source, name), batch_size=batch_size)
    shares = {
        kind: (counts / counts.sum(dim=1, keepdim=True).clamp(min=1)).round(decimals=4).tolist()
        for kind, counts in load.items()
        if int(counts.sum())
    }
    slots = info.model["moe"]["slots"]
    return {"experts": slots, "layers": len(next(iter(shares.values()))), "load": shares}


def _describe(asked: dict[str, Any], given: str) -> dict[str, Any]:
    expected = asked["answer"]
    return {
        "id": asked["id"],
        "task": asked["task"],
        "question": " ".join(PLACEHOLDER.sub("", asked["question"]).split()),
        "media": asked["media"],
        "answer": given,
        "expected": expected,
        "correct": exact_match(given, expected),
    }
