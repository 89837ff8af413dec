"""What every Ray Train worker runs: one training run, from its start model or its last state to its model folder."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist

from unimoe_ray.checkpoint import restore
from unimoe_ray.checkpoint.saver import Outcome, Saver
from unimoe_ray.checkpoint.storage import Folder
from unimoe_ray.config import Config, parse
from unimoe_ray.config.model import PLACEHOLDER_IDS, TOKEN_KINDS
from unimoe_ray.config.training import TrainRun
from unimoe_ray.data import prepare
from unimoe_ray.data.batch import Arrays
from unimoe_ray.data.loader import Layout, Step, iterate_steps, rank_dataset, total_steps
from unimoe_ray.errors import UnimoeError
from unimoe_ray.model.language import mixtures
from unimoe_ray.model.routing import RoutingSums
from unimoe_ray.model.unimoe import to_batch
from unimoe_ray.training import interrupt, recovery, standby
from unimoe_ray.training.allocator import keep_freed_memory
from unimoe_ray.training.checkpoint import ModelInfo, save_model
from unimoe_ray.training.engine import (
    backward_step,
    initialize,
    learning_rate_factor,
    pick_device,
    set_learning_rates,
)
from unimoe_ray.training.expert_placement import ExpertMover, collect_experts, placement_of, spread_experts
from unimoe_ray.training.guard import BadStep, Guard
from unimoe_ray.training.interrupt import PlannedRestart
from unimoe_ray.training.job import Job
from unimoe_ray.training.recipe import order_of, run_seed
from unimoe_ray.training.record import RunRecord
from unimoe_ray.training.routing import over_ranks, routing_metrics
from unimoe_ray.training.stages import make_trainable, merge_lora, start_model
from unimoe_ray.training.validation import ValidationPlan, plan_validation, validate


def train(job: Job) -> None:
    """One worker's part of a training run."""
    config, info = parse(job.config), ModelInfo(**job.info)
    run: TrainRun = getattr(config.stages, job.stage)[job.run]
    rank, world = dist.get_rank(), dist.get_world_size()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.set_num_threads(config.training.threads_per_worker)
    keep_freed_memory()
    seed = run_seed(config, job.stage, job.run)
    torch.manual_seed(seed)
    device = pick_device(config.training)
    states = Folder(job.states)
    state, passed_over = restore.find(states, job.decides)
    done = 0 if state is None else state.step

    model = start_model(config, info, job.stage).to(device)
    model.train()
    groups = make_trainable(model, run)
    ranks = spread_experts(model, config, device, state and state.manifest.placement)
    make_engine = partial(initialize, model, groups, config.training, run.weight_decay, device)
    mover = ExpertMover(ranks, config, make_engine)
    if state is not None:
        restore.load(mover.engine, state)

    order = order_of(config, job.stage, job.run, job.tasks)
    run = run.model_copy(update={"steps": total_steps(job.source, order), "epochs": None})
    saver = Saver(states, config.checkpoint, label=job.label, steps=run.steps, decides=job.decides, start=state)
    layout = Layout(rank, world, config.training.max_tokens_per_micro_batch, config.training.packed_row_tokens or 0)
    blocks = config.data.steps_per_block
    dataset = rank_dataset(job.source, order, layout, blocks, first_step=done, runtime_env=standby.OTHERS)
    steps = iterate_steps(dataset, config.data.prefetch)
    validation = _plan_validation(config, job, rank, world)
    guard = Guard.of_run(config, job.label, done)
    record = RunRecord(config, job.label, done) if rank == 0 else None
    for text in passed_over if record is not None else ():
        record.remark(done, text)
    written: Outcome | None = None
    recovery.mark("restored")
    for number in range(done, run.steps):
        started = time.perf_counter()
        step = next(steps)
        waited = time.perf_counter() - started
        seed_step(seed, number, rank)
        try:
            metrics, routing, stop = train_step(mover.engine, step, run, config, device, guard)
        except BadStep as bad:
            if rank == 0:
                recovery.write_event(config.run_dir, job.label, recovery.BAD_STEP, step=bad.step, reason=bad.reason)
            raise
        metrics |= {"data_wait_s": round(waited, 4), "seconds": round(time.perf_counter() - started, 4)}
        metrics["tokens_per_s"] = round(metrics["tokens"] / max(metrics["seconds"], 1e-9), 1)
        if validation is not None and _is_due(number + 1, run.steps, config):
            metrics["validation"] = validate(mover.engine, validation, device)
        if routing is not None and number + 1 < run.steps and (moved := mover.after_step(number + 1, routing)):
            metrics["moved_experts"] = moved
        written = written or saver.outcome()
        if record is not None:
            line = {"step": number + 1, "steps": run.steps, "stage": job.stage, "run": job.label} | metrics
            record.write(line | {"world": world} | _told(record, written))
        written = None
        if saver.is_due(number + 1):  # with all steps before it on record
            score = mean(metrics["validation"].values()) if "validation" in metrics else None
            written = saver.save(mover.engine, number + 1, placement=placement_of(model), validation=score)
        if stop is not None and number + 1 < run.steps:
            try:
                saver.save_now(mover.engine, number + 1, placement=placement_of(model))
            except UnimoeError as error:
                if config.checkpoint.on_error == "stop":
                    raise
                interrupt.withdraw()
                if record is not None:
                    record.remark(number + 1, f"the workers go on in spite of a {stop}: {error}")
            else:
                raise PlannedRestart(stop, f"the workers stop for a {stop}, their state saved")

    collect_experts(model)
    if rank == 0:
        stats = config.run_dir / "data_stats" / f"{job.label.replace('/', '-')}.txt"
        stats.parent.mkdir(exist_ok=True)
        stats.write_text(dataset.stats())
        if run.lora is not None:
            merge_lora(model)
        final = replace(info, sparse=bool(mixtures(model)))
        save_model(Path(job.folder), model, final, Path(job.tokenizer), job.recipe)
    dist.barrier()
    _told(record, saver.finish())
    ray.train.report(metrics)


def seed_step(seed: int, number: int, rank: int) -> None:
    """Random numbers of a step (dropout) depend on nothing before it: a run that goes on from a state draws those that
    it would have drawn, if its world is the same, and others of the same kind if not. No state keeps any."""
    (drawn,) = np.random.SeedSequence([seed, number, rank]).generate_state(1)
    random.seed(int(drawn))
    np.random.seed(drawn)
    torch.manual_seed(int(drawn))


def _told(record: RunRecord | None, outcome: Outcome | None) -> dict[str, Any]:
    """For the metrics: what became of a state, which the user hears of if it was not written."""
    if outcome is None or record is None:
        return {}
    if outcome.error:
        record.remark(outcome.step, f"the state of this step was not written: {outcome.error}")
    return {"checkpoint": outcome.metrics()}


def train_step(
    engine, step: Step, run: TrainRun, config: Config, device: torch.device, guard: Guard
) -> tuple[dict[str, Any], RoutingSums | None, str | None]:
    """One optimizer step: metrics over all ranks, and this rank's routing (None of a dense model), and the
    cause if workers are to stop after it. Raises as ``Guard`` does."""
    counts = _token_counts(step.micro_batches)
    kinds = [counts[kind] for kind in TOKEN_KINDS]
    local = torch.tensor([counts["answer"], counts["all"], step.samples, *kinds, *interrupt.requested()], device=device)
    dist.all_reduce(local)
    answer_tokens, tokens, samples, *others = local.tolist()
    by_modality, requests = others[: len(kinds)], others[len(kinds) :]

    factor = learning_rate_factor(step.number, run.steps, config.training.optimizer)
    set_learning_rates(engine, factor)
    batches = [to_batch(arrays).to(device) for arrays in step.micro_batches]
    total, routing = backward_step(engine, batches, answer_tokens)
    dist.all_reduce(total)
    loss = float(total) / max(answer_tokens, 1)
    number = step.number + 1
    skipped = guard.before_update(engine, number, loss)
    engine.step()
    skipped = skipped or guard.after_update(engine, number)

    metrics = {
        "loss": round(loss, 6),
        "lr": round(max(run.train.values()) * factor, 8),
        "tokens": tokens,
        "samples": samples,
        "modality": dict(zip(TOKEN_KINDS, by_modality, strict=True)),
        "micro_batches": len(batches),
        **(routing_metrics(over_ranks(routing)) if routing is not None else {"expert_load": None}),
        **({"skipped": skipped} if skipped is not None else {}),
    }
    return metrics, routing, interrupt.agreed(requests)


def _plan_validation(config: Config, job: Job, rank: int, world: int) -> ValidationPlan | None:
    settings = config.training.validation
    if not settings.every:
        return None
    return plan_validation(
        prepare.source(config, prepare.VALIDATION),
        list(job.tasks),
        samples=settings.samples,
        seed=config.seed,
        rank=rank,
        world=world,
        max_tokens=config.training.max_tokens_per_micro_batch,
    )


def _is_due(step: int, steps: int, config: Config) -> bool:
    return step % config.training.validation.every == 0 or step == steps


def _token_counts(micro_batches: list[Arrays]) -> Counter:
    counts: Counter = Counter()
    for arrays in micro_batches:
        ids, mask = arrays["input_ids"], arrays["mask"]
        counts["all"] += int(mask.sum())
        counts["answer"] += int((arrays["labels"] >= 0).sum())
        counts["text"] += int((mask & (ids >= 0)).sum())
        for kind, placeholder in PLACEHOLDER_IDS.items():
            counts[kind] += int((ids == placeholder).sum())
    return counts
