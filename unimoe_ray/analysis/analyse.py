"""``analysis.json`` of a run: soft tokens, routing before and after stage 3, experts switched off, new combinations."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from unimoe_ray.analysis.measures import nearest_words, token_statistics
from unimoe_ray.analysis.routing import batches, paths_of, routing_of
from unimoe_ray.analysis.switch import without_expert
from unimoe_ray.analysis.unseen import NEEDED, as_prompt, combine, media_names
from unimoe_ray.config import Config
from unimoe_ray.config.model import TOKEN_KINDS
from unimoe_ray.data import prepare
from unimoe_ray.data.loader import read_features
from unimoe_ray.data.samples import PreparedSample, SampleTable
from unimoe_ray.data.tokenizer import SPECIALS
from unimoe_ray.evaluation.answer import Lookup, answer
from unimoe_ray.evaluation.evaluate import final_model
from unimoe_ray.evaluation.metrics import exact_match, task_score
from unimoe_ray.model.language import mixtures
from unimoe_ray.model.unimoe import UniMoE, token_kinds
from unimoe_ray.training.checkpoint import ModelInfo, checkpoint_dir, is_complete, load_model, recipe
from unimoe_ray.training.recipe import run_seed
from unimoe_ray.training.stages import parents, start_model

Say = Callable[[str], None]
WORDS = 6  # nearest ones that are shown
UNSEEN = 100  # questions of each new combination
_SEED = 0


@torch.no_grad()
def analyse(config: Config, samples: int, say: Say = lambda _: None) -> dict[str, Any]:
    """Of the run's last finished model, on so many held-out questions of each task. Without experts, what is about them
    is None. Raises UnimoeError without a model or prepared data."""
    folder = final_model(config)
    model, info, tokenizer = load_model(folder)
    source = prepare.source(config, "test")
    table = SampleTable(Path(source.samples))
    features = partial(read_features, source)
    chooser = random.Random(_SEED)
    tasks = {
        task: sorted(chooser.sample(list(rows), min(samples, len(rows)))) for task, rows in _by_task(table).items()
    }
    prompts = [table.get(row) for rows in tasks.values() for row in rows]
    size = config.evaluation.batch_size
    found: dict[str, Any] = {"model": recipe(folder), "samples": samples, "experts": None, "routing": None}
    say(f"soft tokens of {len(prompts)} questions")
    found["soft_tokens"] = _soft_tokens(model, tokenizer, prompts, features, size)
    ask = partial(
        answer, tokenizer=tokenizer, features=features, batch_size=size, max_new_tokens=config.evaluation.max_new_tokens
    )
    if layers := mixtures(model):
        found["experts"] = list(info.model["moe"]["slots"])
        decoder = model.language.get_decoder()
        found["layers"] = [number for number, layer in enumerate(decoder.layers) if layer.mlp in layers]
        say("routing after stage 3, and before it")
        found["routing"] = {"after": routing_of(model, prompts, features, size), "before": None}
        found["paths"] = paths_of(model, prompts, features, size)
        if (before := _before_tune(config, info)) is not None:
            found["routing"]["before"] = routing_of(before, prompts, features, size)
        found["off"] = _switched_off(config, model, tasks, prompts, ask, say)
    say("combinations that training did not have")
    found["unseen"] = _unseen(config, model, info, tokenizer, table, ask)
    return found


def write_analysis(run_dir: Path, found: dict[str, Any]) -> Path:
    path = run_dir / "analysis.json"
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(found), encoding="utf-8")
    temporary.replace(path)
    return path


def _by_task(table: SampleTable) -> dict[str, list[int]]:
    return {task: [int(row) for row in rows] for task, rows in table.by_task().items() if len(rows)}


def _soft_tokens(
    model: UniMoE, tokenizer: Tokenizer, prompts: list[PreparedSample], features: Lookup, batch_size: int
) -> dict[str, dict[str, Any]]:
    """Of the text tokens of the prompts and of each modality's soft tokens."""
    tokens: dict[str, list[torch.Tensor]] = {kind: [] for kind in TOKEN_KINDS}
    for batch in batches(prompts, features, batch_size):
        kinds, embedded = token_kinds(batch.input_ids[batch.mask]), model.embed(batch)[batch.mask]
        for number, kind in enumerate(TOKEN_KINDS):
            tokens[kind].append(embedded[kinds == number])
    special = {tokenizer.token_to_id(name) for name in SPECIALS}
    known = [i for i in range(tokenizer.get_vocab_size()) if i not in special]
    words = [tokenizer.decode([i]) for i in known]
    vocabulary = model.language.get_input_embeddings().weight[known]
    found = {}
    for kind, parts in tokens.items():
        if len(every := torch.cat(parts)):
            found[kind] = {"tokens": len(every)} | token_statistics(every)
            if kind != "text":
                cosine, shares = nearest_words(every, vocabulary, words, WORDS)
                found[kind] |= {"nearest": cosine, "words": [[word, round(share, 4)] for word, share in shares]}
    return found


def _before_tune(config: Config, info: ModelInfo) -> UniMoE | None:
    """The model that stage 3 started from, its random routers included; None where earlier stages are gone."""
    folders = [checkpoint_dir(config.run_dir, stage, run) for stage, run in parents(config, "tune")]
    if not folders or not all(map(is_complete, folders)):
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run_seed(config, "tune", "tune"))
        return start_model(config, replace(info, sparse=False), "tune").eval()


def _switched_off(config: Config, model: UniMoE, tasks, prompts, ask, say: Say) -> dict[str, Any] | None:
    """Accuracy by task with all experts, and with each of them switched off in all layers."""
    number = mixtures(model)[0].num_experts
    if number < 2:
        return None
    asked = prepare.held_out_records(config, "test", {row for rows in tasks.values() for row in rows})
    expected = [asked[row]["answer"] for rows in tasks.values() for row in rows]

    def accuracies() -> dict[str, float]:
        right = [exact_match(*pair) for pair in zip(ask(model, prompts=prompts), expected, strict=True)]
        found, start = {}, 0
        for task, rows in tasks.items():
            found[task] = sum(right[start : start + len(rows)]) / len(rows)
            start += len(rows)
        return found

    say("answers with all experts")
    whole, off = accuracies(), []
    for expert in range(number):
        say(f"answers without expert {expert + 1} of {number}")
        with without_expert(model, expert):
            off.append(accuracies())
    return {"questions": {task: len(rows) for task, rows in tasks.items()}, "all": whole, "without": off}


def _unseen(config: Config, model: UniMoE, info: ModelInfo, tokenizer, table, ask) -> dict[str, Any] | None:
    """By task: media, accuracy, majority, n, and ``alone``: accuracy on one of the same files alone. None for a run
    that is not of the mini suite."""
    tasks = _by_task(table)
    if not all(tasks.get(task) for task in NEEDED):
        return None
    asked = prepare.held_out_records(config, "test", {row for task in NEEDED for row in tasks[task]})
    trained = SampleTable(Path(prepare.source(config, "train").samples)).group_names
    pairs = combine(asked, UNSEEN, trained)
    items = [item for item, _ in pairs] + list(dict.fromkeys(alone for _, alone in pairs if alone))
    samples = {row: table.get(row) for item in items for row, _ in item.media}
    template = info.make_template(tokenizer)
    answers = dict(zip(items, ask(model, prompts=[as_prompt(item, samples, template) for item in items]), strict=True))
    found = {}
    for task, media in media_names([item for item, _ in pairs]).items():
        mine = [(item, alone) for item, alone in pairs if item.task == task]
        known = [alone for _, alone in mine if alone]
        score = task_score([answers[item] for item, _ in mine], [item.expected for item, _ in mine])
        beside = task_score([answers[item] for item in known], [item.expected for item in known]) if known else None
        example, _ = mine[0]
        found[task] = {"media": media, "question": example.question} | score
        if beside:
            found[task] |= {"alone": beside["accuracy"], "alone_task": known[0].task}
    return found
