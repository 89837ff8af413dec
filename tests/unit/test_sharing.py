"""Rows of a step over the places of replicated experts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from unimoe_ray.parallel.sharing import FEW, share_out


def work_of(shares, ranks, count: int) -> list[int]:
    """What each rank has to do: a few rows cost as much as the reading of an expert's weights."""
    work = [0] * count
    for share, places in zip(shares, ranks, strict=True):
        for rows, rank in zip(share, places, strict=True):
            work[rank] += max(rows, FEW) if rows else 0
    return work


def test_without_replicas_every_row_stays_where_its_expert_is():
    assert share_out([5, 0, 700], [[0], [1], [0]]) == [[5], [0], [700]]


def test_a_hot_expert_fills_up_the_rank_that_has_less_to_do():
    assert share_out([1000, 400], [[0, 1], [1]]) == [[700, 300], [400]]
    assert share_out([1000, 400], [[0, 1], [0]]) == [[300, 700], [400]]
    assert share_out([100, 400], [[0, 1], [1]]) == [[100, 0], [400]]
    assert share_out([901, 0], [[0, 2, 1], [1]]) == [[301, 300, 300], [0]]


def test_a_few_rows_are_not_divided_and_go_where_less_is_to_be_read():
    """Two tokens that choose the same expert cost one reading of its weights, not two."""
    assert share_out([2, 1, 0], [[0, 1], [0], [1]]) == [[0, 2], [1], [0]]
    assert share_out([2 * FEW - 1, 0], [[0, 1], [1]]) == [[2 * FEW - 1, 0], [0]]
    assert share_out([2 * FEW, 0], [[0, 1], [1]]) == [[FEW, FEW], [0]]


def test_shares_of_one_expert_make_room_for_those_of_another():
    """Expert 0 is on ranks 0 and 1, expert 1 on 1 and 2: rank 1 must not get half of both."""
    assert work_of(share_out([600, 600], [[0, 1], [1, 2]]), [[0, 1], [1, 2]], 3) == pytest.approx([400] * 3, abs=30)


@pytest.mark.parametrize("seed", range(20))
def test_nearly_as_good_as_the_best_of_all_ways_to_choose_places(seed):
    """Every row arrives once; the busiest rank has at most a twentieth more to do than with the best division into
    tenths."""
    rng = np.random.default_rng(seed)
    ranks = [[int(rank)] for rank in rng.integers(0, 3, 5)]
    for expert in (0, 1, 2):
        ranks[expert] = [int(rank) for rank in rng.permutation(3)[:2]]
    rows = (1000 * rng.permutation(np.arange(1.0, 6) ** -0.8)).astype(int).tolist()
    shares = share_out(rows, ranks)
    assert [sum(share) for share in shares] == rows and min(itertools.chain(*shares)) >= 0
    best = min(
        max(
            work_of(
                [[n * t // 10, n - n * t // 10] for n, t in zip(rows, tenths, strict=False)] + [[n] for n in rows[3:]],
                ranks,
                3,
            )
        )
        for tenths in itertools.product(range(11), repeat=3)
    )
    assert max(work_of(shares, ranks, 3)) <= 1.05 * best
