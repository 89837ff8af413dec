"""The plan: which samples make a step, and their layout over ranks. Properties over many sizes and worlds."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimoe_ray.data.layout import split_step
from unimoe_ray.data.plan import Mixture, MixturePlan
from unimoe_ray.data.samples import Span

weights = st.floats(0.01, 100)
mixtures = st.dictionaries(st.sampled_from("abcdef"), st.tuples(weights, st.integers(1, 30)), min_size=1, max_size=5)


def build(tasks: dict[str, tuple[float, int]]) -> Mixture:
    """Disjoint pools of shuffled row numbers."""
    rows = np.random.default_rng(0).permutation(sum(size for _, size in tasks.values()))
    bounds = np.cumsum([size for _, size in tasks.values()])
    pools = dict(zip(tasks, np.split(rows, bounds[:-1]), strict=True))
    return Mixture.build({task: weight for task, (weight, _) in tasks.items()}, pools)


def samples(mixture: Mixture, steps: int, batch_size: int, seed: int) -> list[np.ndarray]:
    plan = MixturePlan(mixture, steps, batch_size, seed)
    return [plan.samples(step) for step in range(steps)]


def by_task(mixture: Mixture, steps: list[np.ndarray]) -> list[list[list[int]]]:
    """[task][step] its samples."""
    owner = {int(row): number for number, pool in enumerate(mixture.indices) for row in pool}
    split = [[[] for _ in steps] for _ in mixture.tasks]
    for number, rows in enumerate(steps):
        for row in rows.tolist():
            split[owner[row]][number].append(row)
    return split


@settings(max_examples=100, deadline=None)
@given(mixtures, st.integers(1, 25), st.integers(1, 20), st.integers(0, 10**6))
def test_steps(tasks, steps, batch_size, seed):
    mixture = build(tasks)
    plan = samples(mixture, steps, batch_size, seed)
    assert [len(rows) for rows in plan] == [batch_size] * steps
    for number, per_step in enumerate(by_task(mixture, plan)):
        # Every step follows the weights within one sample.
        share = mixture.weights[number] * batch_size
        counts = [len(rows) for rows in per_step]
        assert all(abs(count - share) < 1 + 1e-6 for count in counts)
        # An epoch of a task is over when each of its samples was there once.
        stream = [row for rows in per_step for row in rows]
        pool = sorted(mixture.indices[number].tolist())
        for start in range(0, len(stream), len(pool)):
            epoch = stream[start : start + len(pool)]
            assert len(set(epoch)) == len(epoch)
            assert len(epoch) < len(pool) or sorted(epoch) == pool
    # The plan does not depend on how many steps of it are made, nor on the order in which tasks are named.
    assert all(map(np.array_equal, samples(mixture, (steps + 1) // 2, batch_size, seed), plan))
    again = Mixture.build(
        dict(reversed(list(zip(mixture.tasks, mixture.weights, strict=True)))),
        dict(zip(mixture.tasks, mixture.indices, strict=True)),
    )
    assert all(map(np.array_equal, samples(again, steps, batch_size, seed), plan))


def test_long_run_shares_follow_the_weights():
    mixture = build({"a": (4, 50), "b": (2.5, 7), "c": (0.03, 9)})
    counts = np.array([sum(map(len, s)) for s in by_task(mixture, samples(mixture, 4000, 8, 3))])
    assert np.abs(counts / counts.sum() - mixture.weights).max() < 0.001


def test_seeds_and_epochs_have_orders_of_their_own():
    mixture = build({"a": (1, 40)})
    epochs = [np.concatenate(samples(mixture, 20, 4, seed)).reshape(2, 40).tolist() for seed in range(3)]
    assert len({tuple(epoch) for pair in epochs for epoch in pair}) == 6


lengths = st.one_of(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 3)), min_size=1, max_size=40),
    st.lists(st.tuples(st.just(7), st.just(0)), min_size=1, max_size=9),
)


@settings(max_examples=200, deadline=None)
@given(lengths, st.integers(1, 5), st.integers(16, 200), st.randoms(use_true_random=False))
def test_layout_over_ranks(sizes, world, max_tokens, random):
    size, group = (np.array(column) for column in zip(*sizes, strict=True))
    rows = np.array(random.sample(range(1000), len(sizes)))
    lookup = dict(zip(rows.tolist(), sizes, strict=True))
    ranks = split_step(rows, size, group, world, max_tokens)
    assert len(ranks) == world
    micros = [micro.tolist() for rank in ranks for micro in rank]
    # No sample is lost or repeated, whatever the world and the memory.
    assert Counter(row for micro in micros for row in micro) == Counter(rows.tolist())
    # All ranks have as many micro-batches: each of them takes part in the same reductions.
    assert len({len(rank) for rank in ranks}) == 1
    for micro in filter(None, micros):
        assert len({lookup[row][1] for row in micro}) == 1
        longest = max(lookup[row][0] for row in micro)
        assert len(micro) == 1 or len(micro) * longest <= max_tokens
    # A rank's tokens differ from the mean by less than one sample.
    for rank in ranks:
        tokens = sum(lookup[row][0] for micro in rank for row in micro.tolist())
        assert abs(tokens - size.sum() / world) <= size.max()
    # The order in which the samples come does not matter.
    order = np.array(random.sample(range(len(sizes)), len(sizes)))
    again = split_step(rows[order], size[order], group[order], world, max_tokens)
    assert [[m.tolist() for m in rank] for rank in again] == [[m.tolist() for m in rank] for rank in ranks]


def test_more_ranks_than_samples():
    ranks = split_step(np.array([4]), np.array([10]), np.array([0]), 3, 100)
    assert sorted([micro.tolist() for micro in rank] for rank in ranks) == [[[]], [[]], [[4]]]
    assert {micro.dtype for rank in ranks for micro in rank} == {np.dtype(np.int64)}


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_share_tokens_not_samples(world):
    lengths = np.repeat([2, 100], [60, 20])
    rows = np.arange(len(lengths))
    ranks = split_step(rows, lengths, np.zeros_like(rows), world, 400)
    tokens = [sum(int(lengths[micro].sum()) for micro in rank) for rank in ranks]
    assert max(tokens) - min(tokens) <= 200
    assert len({sum(map(len, rank)) for rank in ranks}) > 1


def test_samples_of_a_weightier_source_come_more_often():
    """Within a task, sample by sample; the task's own weight stays."""
    indices = {"a": np.array([0, 1, 2, 3, 8, 9]), "b": np.array([4, 5, 6, 7])}
    spans = (Span(0, 1.0), Span(4, 3.0), Span(8, 3.0))  # rows 0 to 3, 4 to 7, 8 and 9
    mixture = Mixture.build({"a": 2, "b": 1}, indices, spans)
    steps = samples(mixture, 600, 30, seed=0)
    drawn = np.bincount(np.concatenate(steps), minlength=10) / 600 / 30
    # a: 2/3 of all, of which four samples weigh 1 and two weigh 3; b: 1/3, all alike.
    assert np.allclose(drawn, [2 / 3 / 10] * 4 + [1 / 12] * 4 + [2 / 3 * 3 / 10] * 2, atol=0.002)


def test_sources_of_equal_weight_are_one_pool():
    indices = {"a": np.arange(6)}
    plain = Mixture.build({"a": 1}, indices)
    for spans in ((), (Span(0, 2.0),), (Span(0, 2.0), Span(3, 2.0))):
        mixture = Mixture.build({"a": 1}, indices, spans)
        assert mixture.tasks == plain.tasks and np.array_equal(mixture.indices[0], plain.indices[0])
