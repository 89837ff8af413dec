"""Worlds of DeepSpeed workers with their experts spread over ranks, against plain PyTorch in one process."""

from __future__ import annotations

import gc
from functools import cache, partial
from itertools import product
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
    result["state"] = {
        name: torch.stack([p.detach(), optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]])
        for name, p in trained.items()
    }
    return result


def train(case: Case, rank: int, world: int) -> dict:
    """The same on one rank of a world."""
    from deepspeed.utils import safe_get_full_grad

    from unimoe_ray.parallel.expert_parallel import distribute, gather
    from unimoe_ray.parallel.relocate import relocate
    from unimoe_ray.parallel.state import read, updates_done

    config = TrainingConfig(zero_stage=case.zero, optimizer=OPTIMIZER, precision=case.precision)
    model, groups = build(case.model)
    if case.checkpointed:
        model.language.gradient_checkpointing_enable({"use_reentrant": False})
    if case.placement is not None:
        distribute(model, case.placement)

    def make_engine():
        return initialize(model, groups, config, TRAIN[case.model.trains].weight_decay, torch.device("cpu"))

    engine = make_engine()
    each = SAMPLES // world
    bounds = [rank * each + i * each // case.per_rank for i in range(case.per_rank + 1)]
    outputs = record_outputs(model)
    result: dict = {"losses": [], "norms": [], "router_losses": []}
    for step in range(case.model.steps):
        if step in case.moves:
            engine = relocate(engine, case.moves[step], make_engine)
            gc.collect()  # whenever the old engine goes, it must not touch what the new one has
        batches = [micro_batch(step, range(*ends)) for ends in zip(bounds, bounds[1:], strict=False)]
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
    assert updates_done(engine) == case.model.steps
    result["state"] = read(engine)
    gather(model)
    if rank == 0:
        result["after"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    return result


def work(rank: int, world: int, cases: dict[str, Case], out: Path) -> None:
    for name, case in cases.items():
        torch.save(train(case, rank, world), out / f"{name}-{rank}.pt")


def check(world: int, cases: dict[str, Case], out: Path) -> None:
    run_world(world, partial(work, cases=cases, out=out))
    results = {
        name: [torch.load(out / f"{name}-{rank}.pt", weights_only=True) for rank in range(world)] for name in cases
    }
    for name, case in cases.items():
        ranks = results[name]
        if case.same_as is not None:
            twin = results[case.same_as]
            exact = case.precision == "fp32"
            assert ranks[0]["losses"] == pytest.approx(twin[0]["losses"], rel=1e-6 if exact else 5e-3), name
            assert_near(ranks[0]["after"], twin[0]["after"], 1e-5 if exact else 1e-2, name)
        if case.precision == "fp32":
            compare(name, ranks, reference(case.model))


def compare(name: str, ranks: list[dict], expected: dict) -> None:
    outputs = [output for rank in ranks for output in rank["outputs"]]
    for own, wanted in zip(outputs, expected["outputs"], strict=True):
        assert torch.allclose(own, wanted, atol=2e-6, rtol=1e-5), name
    assert torch.equal(sum(rank["counts"] for rank in ranks), expected["counts"]), name
    assert {key for rank in ranks for key in rank["grads"]} == expected["grads"].keys(), name
    for rank in ranks:
        for key, grad in rank["grads"].items():
            wanted = expected["grads"][key]
            assert (grad - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1e-3), (name, key)
        for key, (weight, *moments) in rank["state"].items():
            assert (weight - expected["state"][key][0]).abs().max() <= 1e-5, (name, key)
            for own, wanted in zip(moments, expected["state"][key][1:], strict=True):
                assert (own - wanted).abs().max() <= 1e-4 * wanted.abs().max().clamp(min=1e-6), (name, key)
        for key in ("norms", "losses", "router_losses"):
            assert rank[key] == pytest.approx(expected[key], rel=1e-5), (name, key)
    assert list(ranks[0]["after"]) == list(expected["after"]), name
    assert_near(ranks[0]["after"], expected["after"], 1e-5, name)


def assert_near(own: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float, name: str) -> None:
    assert own.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert (own[key] - tensor).abs().max() <= tolerance, (name, key)


FULL, LORA, FROZEN, SKEWED = Model(), Model("lora"), Model("frozen experts"), Model("lora", skewed=True)
LONG, LONG_LORA = Model(steps=7), Model("lora", steps=7)
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
        "still-z2-full-acc1": Case(LONG, (EVEN, UNEVEN), zero=2),
        "moved-z2-full-acc1": Case(
            LONG,
            (EVEN, UNEVEN),
            zero=2,
            moves={2: (CROSSED, UNEVEN), 5: (UNEVEN, EVEN)},
            same_as="still-z2-full-acc1",
        ),
        "moved-z1-lora-acc3": Case(LORA, (EVEN, EVEN), zero=1, per_rank=3, moves={2: (MIRRORED, CROSSED)}),
        "moved-frozen-z2-acc1": Case(FROZEN, (EVEN, EVEN), zero=2, moves={2: (MIRRORED, CROSSED)}),
        "bf16-ep1-z2": Case(FULL, zero=2, precision="bf16"),
        "bf16-ep2-z2": Case(FULL, (EVEN, UNEVEN), zero=2, precision="bf16", same_as="bf16-ep1-z2"),
        "balanced-ep1-z2": Case(BALANCED[1], zero=2),
        **{f"balanced-{i}-ep2-z2": Case(model, (EVEN, UNEVEN), zero=2) for i, model in enumerate(BALANCED)},
    },
    3: {
        "z1-full-acc1": Case(FULL, (THREE, THREE[::-1]), zero=1),
        "z2-lora-acc3": Case(LORA, (THREE, ((), (0, 1), (2, 3))), zero=2, per_rank=3),
        "skewed-z2-lora-acc1": Case(SKEWED, (((4,), (0, 1), (2, 3)), ((0,), (4,), (1, 2, 3))), zero=2),
    },
    4: {
        "ep1-z1-full-acc1": Case(FULL, zero=1),
        "ep2-z1-lora-acc1": Case(LORA, (EVEN, CROSSED), zero=1),
        "ep2-uneven-z2-full-acc3": Case(FULL, (UNEVEN, MIRRORED), zero=2, per_rank=3),
        "ep4-z2-lora-acc3": Case(LORA, (EACH, EACH[::-1]), zero=2, per_rank=3),
        "ep4-z1-full-acc1": Case(FULL, (EACH[::-1], EACH), zero=1),
        "still-ep2-z2-lora-acc1": Case(LONG_LORA, (EVEN, UNEVEN), zero=2),
        "moved-ep2-z2-lora-acc1": Case(
            LONG_LORA,
            (EVEN, UNEVEN),
            zero=2,
            moves={2: (MIRRORED, EVEN), 3: (EVEN, CROSSED), 6: (EVEN, EVEN)},
            same_as="still-ep2-z2-lora-acc1",
        ),
        "moved-ep4-z1-full-acc1": Case(FULL, (EACH, EACH), zero=1, moves={2: (EACH[::-1], EACH)}),
        **{f"balanced-{i}-ep2-z2": Case(model, (EVEN, UNEVEN), zero=2) for i, model in enumerate(BALANCED)},
    },
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", CASES)
def test_a_world_equals_one_process(world, tmp_path):
    check(world, CASES[world], tmp_path)


def _product(world: int) -> dict[str, Case]:
    """Everything with everything, one after another in the same processes."""
    plain = {
        2: [None, (EVEN, CROSSED), (UNEVEN, MIRRORED)],
        3: [None, (THREE, THREE[::-1])],
        4: [None, (EVEN, UNEVEN), (EACH, EACH[::-1])],
    }[world]
    skewed = {
        2: [None, (((0, 4, 2), (3, 1)), ((4,), (0, 1, 2, 3)))],
        3: [None, (((4,), (0, 1), (2, 3)), ((0,), (4,), (1, 2, 3)))],
        4: [
            None,
            (((4,), (0, 1, 2, 3)), ((0, 1), (2, 3, 4))),
            (((0, 1), (2,), (3,), (4,)), ((4,), (3,), (2, 1), (0,))),
        ],
    }[world]
    cases = {}
    for trains, zero, per_rank in product(("full", "lora"), (1, 2), (1, 3)):
        for number, placement in enumerate(plain):
            cases[f"{trains}-z{zero}-acc{per_rank}-{number}"] = Case(Model(trains), placement, zero, per_rank)
        for number, placement in enumerate(skewed):
            model = Model(trains, skewed=True)
            cases[f"skewed-{trains}-z{zero}-acc{per_rank}-{number}"] = Case(model, placement, zero, per_rank)
    return cases


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("world", CASES)
def test_every_combination_equals_one_process(world, tmp_path):
    check(world, _product(world), tmp_path)
