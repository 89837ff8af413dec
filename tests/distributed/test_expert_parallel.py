"""Worlds of DeepSpeed workers with their experts spread over ranks, against plain PyTorch in one process."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.worlds import (
    OPTIMIZER,
    SAMPLES,
    TRAIN,
    Case,
    Model,
    build,
    micro_batch,
    record_outputs,
    run_world,
    samples,
)
from unimoe_ray.config.training import TrainingConfig
from unimoe_ray.training.engine import backward_step, initialize, learning_rate_factor, set_learning_rates

EVEN = ((0, 1), (2, 3))
CROSSED = ((3, 0), (2, 1))
UNEVEN = ((0, 1, 3), (2,))
MIRRORED = ((1,), (0, 2, 3))
THREE = ((0, 1), (2,), (3,))
EACH = ((0,), (1,), (2,), (3,))


@cache
def reference(settings: Model) -> dict:
    """One process, all samples of a step in one batch, plain AdamW."""
    model, groups = build(settings)
    config, run = OPTIMIZER, TRAIN[settings.trains]
    optimizer = torch.optim.AdamW(
        [{"params": g.parameters, "lr": g.lr} for g in groups],
        betas=config.betas,
        eps=config.eps,
        weight_decay=run.weight_decay,
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    result: dict = {"losses": [], "norms": [], "router_losses": []}
    for step in range(settings.steps):
        for group, g in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = g.lr * learning_rate_factor(step, settings.steps, config)
        batch = micro_batch(step, range(SAMPLES))
        outputs = record_outputs(model) if step == 0 else []
        optimizer.zero_grad()
        loss = model(batch)
        answers = int(loss.answer_tokens)
        (loss.token_loss / answers + loss.router_loss).backward()
        result["losses"].append(loss.token_loss.item() / answers)
        result["router_losses"].append(loss.router_loss.item() if settings.moe else 0.0)
        if step == 0:
            rows = outputs[0].view(*batch.mask.shape, -1)
            result["outputs"] = [row[mask] for row, mask in zip(rows, batch.mask, strict=True)]
            result["grads"] = {name: p.grad.clone() for name, p in trained.items()}
            result["counts"] = torch.stack([stats.tokens_per_expert for stats in model.recorder.layers])
        result["norms"].append(float(torch.nn.utils.clip_grad_norm_(trained.values(), config.clip)))
        optimizer.step()
    result["after"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    return result


def train(case: Case, rank: int, world: int) -> dict:
    """The same on one rank of a world."""
    from deepspeed.utils import safe_get_full_grad

    from unimoe_ray.parallel.expert_parallel import distribute, gather
    from unimoe_ray.parallel.relocate import relocate

    config = TrainingConfig(zero_stage=case.zero, optimizer=OPTIMIZER)
    model, groups = build(case.model)
    if case.checkpointed:
        model.language.gradient_checkpointing_enable({"use_reentrant": False})
    if case.placement is not None:
        distribute(model, case.placement)

    def make_engine():
        return initialize(model, groups, config, TRAIN[case.model.trains].weight_decay, torch.device("cpu"))

    engine = make_engine()
    each = SAMPLES // world // case.per_rank
    first = rank * case.per_rank * each
    outputs = record_outputs(model)
    result: dict = {"losses": [], "norms": [], "router_losses": []}
    for step in range(case.model.steps):
        if step in case.moves:
            engine = relocate(engine, case.moves[step], make_engine)
        batches = [micro_batch(step, range(first + i * each, first + (i + 1) * each)) for i in range(case.per_rank)]
        answers = sum(int((sample.labels[:, 1:] >= 0).sum()) for sample in samples(step))
        set_learning_rates(engine, learning_rate_factor(step, case.model.steps, config.optimizer))
        outputs.clear()
        total, sums = backward_step(engine, batches, answers)
        dist.all_reduce(total)
        result["losses"].append(total.item() / answers)
        result["router_losses"].append(model.recorder.loss(model.config.moe).item() if case.model.moe else 0.0)
        if step == 0:
            result["outputs"] = [
                row[mask]
                for out, batch in zip(outputs, batches, strict=False)  # what is recomputed comes after
                for row, mask in zip(out.view(*batch.mask.shape, -1), batch.mask, strict=True)
            ]
            grads = {name: safe_get_full_grad(p).clone() for name, p in model.named_parameters() if p.requires_grad}
            result["grads"], result["counts"] = grads, sums.routed.sum(1)
        engine.step()
        result["norms"].append(float(engine.get_global_grad_norm()))
    gather(model)
    if rank == 0:
        result["after"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    return result


def work(rank: int, world: int, cases: dict[str, Case], out: Path) -> None:
    for name, case in cases.items():
        torch.save(train(case, rank, world), out / f"{name}-{rank}.pt")


def check(world: int, cases: dict[str, Case], out: Path) -> None:
    run_world(world, partial(work, cases=cases, out=out))
    for name, case in cases.items():
        expected = reference(case.model)
        ranks = [torch.load(out / f"{name}-{rank}.pt", weights_only=True) for rank in range(world)]
        outputs = [output for rank in ranks for output in rank["outputs"]]
        for own, wanted in zip(outputs, expected["outputs"], strict=True):
            assert torch.allclose(own, wanted, atol=2e-6, rtol=1e-5), name
        assert torch.equal(sum(rank["counts"] for rank in ranks), expected["counts"]), name
        assert {key for rank in ranks for key in rank["grads"]} == expected["grads"].keys()
        for rank in ranks:
            for key, grad in rank["grads"].items():
                wanted = expected["grads"][key]
                assert (grad - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1e-3), (name, key)
            assert rank["norms"] == pytest.approx(expected["norms"], rel=1e-5), name
            assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-5), name
            assert rank["router_losses"] == pytest.approx(expected["router_losses"], rel=1e-5), name
        assert list(ranks[0]["after"]) == list(expected["after"]), name
        for key, wanted in expected["after"].items():
            assert (ranks[0]["after"][key] - wanted).abs().max() <= 1e-5, (name, key)


FULL, LORA, FROZEN, SKEWED = Model(), Model("lora"), Model("frozen experts"), Model("lora", skewed=True)
BALANCED = [
    Model(steps=2, moe=(("balance_coef", 0.5), ("z_loss_coef", 0.05))),
    Model(steps=2, moe=(("balance_coef", 0.5), ("balance_share", "first"), ("balance_over_layers", "sum"))),
    Model("lora", steps=2, moe=(("balance_coef", 0.5), ("balance_per", "modality"))),
]
CASES: dict[int, dict[str, Case]] = {
    2: {
        "ep1-z2-lora-acc3": Case(LORA, zero=2, per_rank=3),
        "ep2-z1-full-acc1": Case(FULL, (EVEN, CROSSED), zero=1),
        "ep2-z2-lora-acc3": Case(LORA, (CROSSED, EVEN), zero=2, per_rank=3),
        "uneven-z2-full-acc3": Case(FULL, (UNEVEN, MIRRORED), zero=2, per_rank=3),
        "uneven-z1-lora-acc1": Case(LORA, (MIRRORED, UNEVEN), zero=1),
        "skewed-z2-lora-acc1": Case(SKEWED, (((0, 4, 2), (3, 1)), ((4,), (0, 1, 2, 3))), zero=2),
        "rates-z2-experts-acc1": Case(Model("experts"), (EVEN, UNEVEN), zero=2),
        "frozen-z2-acc1": Case(FROZEN, (UNEVEN, EVEN), zero=2),
        "checkpointed-z2-lora-acc3": Case(LORA, (EVEN, UNEVEN), zero=2, per_rank=3, checkpointed=True),
        "moved-z2-full-acc1": Case(FULL, (EVEN, UNEVEN), zero=2, moves={1: (CROSSED, UNEVEN), 3: (UNEVEN, EVEN)}),
        "moved-z1-lora-acc3": Case(LORA, (EVEN, EVEN), zero=1, per_rank=3, moves={2: (MIRRORED, CROSSED)}),
        "moved-frozen-z2-acc1": Case(FROZEN, (EVEN, EVEN), zero=2, moves={2: (MIRRORED, CROSSED)}),
        "balanced-ep1-z2": Case(BALANCED[1], zero=2),
        **{f"balanced-{i}-ep2-z2": Case(model, (EVEN, UNEVEN), zero=2) for i, model in enumerate(BALANCED)},
    },
    3: {
        "z1-full-acc1": Case(FULL, (THREE, THREE[::-1]), zero=1),
        "z2-lora-acc2": Case(LORA, (THREE, ((), (0, 1), (2, 3))), zero=2, per_rank=2),
        "skewed-z2-lora-acc1": Case(SKEWED, (((4,), (0, 1), (2, 3)), ((0,), (4,), (1, 2, 3))), zero=2),
    },
    4: {
        "ep1-z1-full-acc1": Case(FULL, zero=1),
        "ep2-z1-lora-acc1": Case(LORA, (EVEN, CROSSED), zero=1),
        "ep2-uneven-z2-full-acc3": Case(FULL, (UNEVEN, MIRRORED), zero=2, per_rank=3),
        "ep4-z2-lora-acc3": Case(LORA, (EACH, EACH[::-1]), zero=2, per_rank=3),
        "ep4-z1-full-acc1": Case(FULL, (EACH[::-1], EACH), zero=1),
        "moved-ep2-z2-lora-acc1": Case(LORA, (EVEN, UNEVEN), zero=2, moves={1: (MIRRORED, EVEN), 3: (EVEN, CROSSED)}),
        "moved-ep4-z1-full-acc1": Case(FULL, (EACH, EACH), zero=1, moves={2: (EACH[::-1], EACH)}),
        **{f"balanced-{i}-ep2-z2": Case(model, (EVEN, UNEVEN), zero=2) for i, model in enumerate(BALANCED)},
    },
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", CASES)
def test_a_world_equals_one_process(world, tmp_path):
    check(world, CASES[world], tmp_path)
