"""Bad losses: which are, what is done about them, and that the engine then makes no update."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.distributed as dist

from tests.distributed.worlds import OPTIMIZER, TRAIN, Model, build, run_world, samples
from unimoe_ray.config.elastic import ElasticConfig
from unimoe_ray.config.training import TrainingConfig
from unimoe_ray.errors import UnimoeError
from unimoe_ray.training.guard import BadStep, Guard, void_gradients

STEADY = [2.0, 2.1, 1.9, 2.0, 2.0]


class Engine:
    """What a guard needs of one: gradients to be voided."""

    def __init__(self):
        self.gradient = torch.ones(3)
        self.optimizer = self
        self.averaged_gradients = {0: [self.gradient]}
        self.overflow = False


def judge(loss: float, step: int = 6, losses=STEADY, known=None, **settings) -> tuple[str | None, bool]:
    """The reason, and whether the update is left out."""
    engine = Engine()
    reason = Guard(ElasticConfig(**settings), known or {}, list(losses)).before_update(engine, step, loss)
    return reason, bool(engine.gradient.isnan().any())


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (2.2, None),
        (19.9, None),
        (21.0, "the loss is 21, 10 times the median of the last steps"),
        (math.nan, "the loss is nan"),
        (math.inf, "the loss is inf"),
    ],
)
def test_a_loss_that_is_not_finite_or_explodes_makes_no_update(loss, reason):
    assert judge(loss) == (reason, reason is not None)


def test_a_loss_that_was_as_high_before_does_not_explode():
    assert judge(30.0, losses=[31.0, *([1.0] * 10)]) == (None, False)
    assert judge(32.0, losses=[31.0, *([1.0] * 10)])[1]
    assert judge(300.0, losses=[1.0] * 4) == (None, False)  # too few to compare with


def test_a_run_stops_where_it_is_to_and_where_step_after_step_is_bad():
    with pytest.raises(UnimoeError, match=r"step 6: the loss is nan \(training.elastic.bad_loss is stop\)"):
        judge(math.nan, bad_loss="stop")
    guard = Guard(ElasticConfig(max_bad_steps=3), {}, [])
    for step in (1, 2, 4, 5):
        assert guard.before_update(Engine(), step, math.nan)
        if step == 2:
            assert guard.before_update(Engine(), 3, 1.0) is None
    with pytest.raises(UnimoeError, match="step 6: the loss is nan, and the 3 steps up to it were bad"):
        guard.before_update(Engine(), 6, math.nan)


def test_a_run_goes_back_once_and_then_past_the_step():
    with pytest.raises(BadStep, match="step 6: the loss is nan; back to the last saved state") as raised:
        judge(math.nan, bad_loss="rewind")
    known = {raised.value.step: raised.value.reason}
    assert judge(2.0, bad_loss="rewind", known=known) == ("left out: the loss is nan", True)
    assert judge(2.0, step=7, bad_loss="rewind", known=known) == (None, False)
    with pytest.raises(UnimoeError, match="the 2 steps up to it were bad"):
        judge(math.nan, step=7, bad_loss="rewind", known=known, max_bad_steps=2)


def left_out(rank: int, world: int, zero: int) -> None:
    """Step 2 of 3, whose gradients are void on all ranks, and step 3, whose gradient one rank makes infinite: weights
    and moments are those after step 1."""
    from unimoe_ray.training.engine import backward_step, initialize

    model, groups = build(Model("experts"))
    config = TrainingConfig(optimizer=OPTIMIZER, zero_stage=zero)
    engine = initialize(model, groups, config, TRAIN["experts"].weight_decay, torch.device("cpu"))

    def step(number: int, spoil) -> list[torch.Tensor]:
        mine = samples(number)[rank::world]
        tokens = sum(int((batch.labels >= 0).sum()) for batch in samples(number))
        backward_step(engine, mine, tokens)
        spoil()
        engine.step()
        return [parameter.detach().clone() for parameter in model.parameters()]

    def infinite() -> None:
        if rank == 0:
            next(g for group in engine.optimizer.averaged_gradients.values() for g in group if g.numel()).fill_(
                torch.inf
            )

    first = step(0, lambda: None)
    for spoil in (lambda: void_gradients(engine), infinite):
        assert all(map(torch.equal, first, step(1, spoil)))
        assert engine.optimizer.overflow
    last = step(2, lambda: None)
    assert not engine.optimizer.overflow and not all(map(torch.equal, first, last))
    assert all(bool(parameter.isfinite().all()) for parameter in last)
    dist.barrier()


@pytest.mark.parametrize("zero", [1, 2])
def test_the_engine_leaves_a_voided_step_out_on_all_ranks(zero):
    run_world(2, partial(left_out, zero=zero))
