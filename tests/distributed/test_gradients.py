"""Two DeepSpeed workers against plain PyTorch in one process: every stage, ranks on different modalities."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.worlds import run_world
from tests.tiny import TinyRun, make_tiny_run
from unimoe_ray.data import prepare
from unimoe_ray.data.batch import collate
from unimoe_ray.data.loader import Layout, planned_micro_batches, read_features
from unimoe_ray.data.plan import Order
from unimoe_ray.data.samples import SampleTable
from unimoe_ray.model.unimoe import to_batch
from unimoe_ray.training.engine import backward_step, initialize, learning_rate_factor
from unimoe_ray.training.stages import make_trainable, start_model

SEED = 3
# Images and videos, which different ranks may be on, have one projector.
SHARED = {"model": {"connectors": {"video": "image"}, "video": {"pooling": "mean"}}}
STAGES = [("base", "base"), ("align", "align"), ("experts", "image"), ("tune", "tune")]


def _model(run: TinyRun, stage: str, name: str):
    torch.manual_seed(SEED)
    model = start_model(run.config, run.info, stage)
    groups = make_trainable(model, getattr(run.config.stages, stage)[name])
    with torch.no_grad():  # LoRA's B starts at zero: give every adapter a gradient path
        for key, parameter in model.named_parameters():
            if ".lora_B." in key:
                parameter.normal_(std=0.1)
    return model, groups


def _order(run: TinyRun, stage: str, name: str) -> Order:
    settings = getattr(run.config.stages, stage)[name]
    return Order(tuple(settings.tasks.items()), settings.batch_size, SEED, settings.steps)


def _reference(run: TinyRun, stage: str, name: str) -> tuple[dict, dict]:
    """Gradients of the first step and parameters after all steps: one process, one sample at a time."""
    settings = getattr(run.config.stages, stage)[name]
    source = prepare.source(run.config, "train")
    table = SampleTable(Path(source.samples))
    model, groups = _model(run, stage, name)
    config = run.config.training.optimizer
    optimizer = torch.optim.AdamW(
        [{"params": g.parameters, "lr": g.lr} for g in groups],
        betas=config.betas,
        eps=config.eps,
        weight_decay=settings.weight_decay,
    )
    trainable = {key: p for key, p in model.named_parameters() if p.requires_grad}
    first = {}
    plan = _order(run, stage, name).plan(table)
    for number in range(plan.steps):
        for group, g in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = g.lr * learning_rate_factor(number, settings.steps, config)
        optimizer.zero_grad()
        batches = [
            to_batch(collate([table.get(int(row))], lambda n: read_features(source, n))) for row in plan.samples(number)
        ]
        answers = sum(int((b.labels >= 0).sum()) for b in batches)
        for batch in batches:
            (model(batch).token_loss / answers).backward()
        first = first or {key: p.grad.clone() for key, p in trainable.items()}
        torch.nn.utils.clip_grad_norm_(trainable.values(), config.clip)
        optimizer.step()
    return first, {key: p.detach().clone() for key, p in trainable.items()}


def _worker(rank: int, world: int, run: TinyRun, out: Path) -> None:
    results = {stage: _train(rank, world, run, stage, name) for stage, name in STAGES}
    torch.save(results, out / f"{rank}.pt")


def _train(rank: int, world: int, run: TinyRun, stage: str, name: str) -> dict:
    from deepspeed.utils import safe_get_full_grad

    settings = getattr(run.config.stages, stage)[name]
    source = prepare.source(run.config, "train")
    table = SampleTable(Path(source.samples))
    model, groups = _model(run, stage, name)
    engine = initialize(model, groups, run.config.training, settings.weight_decay, torch.device("cpu"))
    plan = planned_micro_batches(
        source, _order(run, stage, name), Layout(rank, world, max_tokens=48), range(settings.steps)
    )
    grads, modalities = {}, []
    for number, micros in enumerate(plan):
        batches = [
            to_batch(collate([table.get(int(r)) for r in m], lambda n: read_features(source, n))) for m in micros
        ]
        modalities.append([sorted(b.features) for b in batches])
        answers = torch.tensor(sum(int((b.labels >= 0).sum()) for b in batches))
        dist.all_reduce(answers)
        for group, g in zip(engine.optimizer.param_groups, groups, strict=True):
            group["lr"] = g.lr * learning_rate_factor(number, settings.steps, run.config.training.optimizer)
        backward_step(engine, batches, int(answers))
        if number == 0:
            grads = {key: safe_get_full_grad(p).clone() for key, p in model.named_parameters() if p.requires_grad}
        engine.step()
    after = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    return {"grads": grads, "after": after, "modalities": modalities}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("zero_stage", "changes"),
    [(1, {}), (2, {}), pytest.param(2, SHARED, marks=pytest.mark.slow)],
    ids=["1", "2", "shared-2"],
)
def test_two_workers_equal_one_process(tmp_path, zero_stage, changes):
    tiny_run = make_tiny_run(tmp_path, training={"zero_stage": zero_stage}, **changes)
    run_world(2, partial(_worker, run=tiny_run, out=tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for stage, name in STAGES:
        grads, after = _reference(tiny_run, stage, name)
        assert all(grad.abs().max() > 0 for grad in grads.values())
        results = [rank[stage] for rank in ranks]
        if stage != "base":
            pairs = zip(*(result["modalities"] for result in results), strict=True)
            assert any(a != b for step_a, step_b in pairs for a, b in zip(step_a, step_b, strict=True))
        for result in results:
            assert result["grads"].keys() == grads.keys()
            for key, expected in grads.items():
                scale = expected.abs().max().clamp(min=1e-3)
                assert (result["grads"][key] - expected).abs().max() <= 1e-5 * scale, (stage, key)
            for key, expected in after.items():
                assert torch.allclose(result["after"][key], expected, atol=1e-5), (stage, key)
