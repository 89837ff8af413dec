"""Orders that are computed place by place, and tables of which only the rows asked for are read."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimoe_ray.data import order
from unimoe_ray.data.columns import BLOCK, Column
from unimoe_ray.data.order import SHUFFLED, permute, stream
from unimoe_ray.data.plan import EpochPlan, Mixture, MixturePlan


def keys(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(2**64, size=8, dtype=np.uint64)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 10**6))
def test_permutations_are_bijections(size, seed):
    assert sorted(permute(np.arange(size), size, keys(seed)).tolist()) == list(range(size))


def test_they_are_as_even_as_random_ones():
    """Where a place goes, and where its neighbour goes, over many keys; chi-square against 5 standard deviations."""
    size, rounds = 12, 6000
    sent = np.stack([permute(np.arange(size), size, keys(seed)) for seed in range(rounds)])
    for counts, cells, free in (
        (np.stack([np.bincount(sent[:, i], minlength=size) for i in range(size)]), size * size, (size - 1) ** 2),
        (np.bincount(sent[:, 3] * size + sent[:, 4], minlength=size * size), size * (size - 1), size * (size - 1) - 1),
    ):
        expected = counts.sum() / cells
        chi = ((counts[counts > 0] - expected) ** 2 / expected).sum() + expected * (cells - (counts > 0).sum())
        assert abs(chi - free) < 5 * np.sqrt(2 * free)


def test_a_large_one_is_even_too():
    """A thousand places in a row of ten thousand million land everywhere, and far from each other."""
    size = 10**10
    sent = permute(np.arange(10**9, 10**9 + 100_000), size, keys(1))
    assert len(set(sent.tolist())) == len(sent) and sent.min() >= 0 and sent.max() < size
    counts = np.bincount(sent * 100 // size, minlength=100)
    assert np.abs(counts - 1000).max() < 6 * np.sqrt(1000)
    assert abs(np.corrcoef(sent[:-1], sent[1:])[0, 1]) < 0.02


@pytest.mark.parametrize("shuffled", [SHUFFLED, 0])
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), st.integers(0, 300), st.integers(0, 120), st.integers(0, 99))
def test_streams(shuffled, size, start, count, seed):
    """Any part of one is that part of the whole, and every epoch has all places once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "SHUFFLED", shuffled)
        whole = stream("a", size, 0, 10 * size, seed).reshape(10, size)
        assert np.array_equal(np.sort(whole, axis=1), np.tile(np.arange(size), (10, 1)))
        start %= 5 * size
        stop = min(start + count, 10 * size)
        assert np.array_equal(stream("a", size, start, stop, seed), whole.reshape(-1)[start:stop])
        if size > 20:
            others = [stream("b", size, 0, size, seed), stream("a", size, 0, size, seed + 1), whole[1]]
            assert all(not np.array_equal(whole[0], other) for other in others)


pieces = st.lists(st.integers(0, 2 * BLOCK + 50), max_size=4)


@settings(max_examples=40, deadline=None)
@given(pieces, st.integers(1, 4), st.integers(0, 10**6))
def test_columns(sizes, codes, seed):
    rng = np.random.default_rng(seed)
    whole = [rng.integers(codes, size=size).astype(np.int32) for size in sizes]
    column, flat = Column(whole, np.int64), np.concatenate([np.zeros(0, np.int64), *whole])
    assert len(column) == len(flat) and np.array_equal(np.asarray(column), flat)
    wanted = rng.integers(len(flat), size=50) if len(flat) else np.zeros(0, np.int64)
    assert np.array_equal(column[wanted], flat[wanted])
    for code in np.unique(flat).tolist():
        rows, expected = column.rows_of(code), np.flatnonzero(flat == code)
        assert len(rows) == len(expected) and np.array_equal(np.asarray(rows), expected)
        places = rng.integers(len(expected), size=30)
        assert np.array_equal(rows[places], expected[places])
        cut = slice(*sorted(rng.integers(len(expected) + 1, size=2).tolist()))
        assert list(rows[cut]) == expected[cut].tolist()
        assert rows[len(rows) - 1] == expected[-1]
        with pytest.raises(IndexError, match=f"place {len(rows)} of {len(rows)}"):
            rows[len(rows)]


class Numbers:
    """The first ``size`` numbers, none of which is in memory."""

    def __init__(self, size: int):
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        return places


@pytest.mark.parametrize("kind", ["mixture", "epoch"])
def test_a_step_of_a_thousand_million_samples_takes_no_more_memory(kind):
    peaks = []
    for size in (10**6, 10**9):
        if kind == "epoch":
            plan = EpochPlan(Numbers(size), 3, 256, seed=0)
            assert plan.steps == 3 * -(-size // 256)
        else:
            plan = MixturePlan(Mixture.build({"a": 2, "b": 1}, {t: Numbers(size) for t in "ab"}), size, 256, seed=0)
        tracemalloc.start()
        rows = plan.samples(plan.steps // 2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(rows) == 256 and rows.max() < size
    assert peaks[1] < 1.5 * peaks[0] < 2**20
