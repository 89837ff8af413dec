"""The plan: which samples make a step, and their layout over ranks. Properties over many sizes and worlds."""

import hashlib
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimoe_ray.data.layout import padded_tokens, split_step
from unimoe_ray.data.loader import Layout, planned_micro_batches, total_steps
from unimoe_ray.data.plan import Mixture, MixturePlan, Order, floor_sum
from unimoe_ray.data.samples import PreparedSample, SampleTable, SampleWriter, Source, Span

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


def slow_samples(mixture: Mixture, steps: int, batch_size: int, seed: int) -> list[np.ndarray]:
    """All steps, one after the other, each task's epochs whole in memory: what recipes were measured with."""
    counts, edges = [], np.cumsum([0, *mixture.weights])
    edges[-1] = 1.0
    for step in range(steps):
        offset = (seed * 0.6180339887498949 + step * 0.6180339887498949) % 1.0
        counts.append(np.diff([min(max(math.ceil(edge * batch_size - offset), 0), batch_size) for edge in edges]))
    columns = []
    for task, pool, count in zip(mixture.tasks, mixture.indices, np.transpose(counts), strict=True):
        name = int.from_bytes(hashlib.sha256(task.encode()).digest()[:8], "little")
        epochs = range(-(-sum(count) // len(pool)))
        orders = [np.random.default_rng([seed, name, epoch]).permutation(pool) for epoch in epochs]
        columns.append(np.split(np.concatenate([*orders, pool[:0]])[: sum(count)], np.cumsum(count)[:-1]))
    return [np.concatenate([column[step] for column in columns]) for step in range(steps)]


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
    assert all(map(np.array_equal, plan, slow_samples(mixture, steps, batch_size, seed)))
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
    # The plan does not depend on the order in which tasks are named.
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


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 60), st.integers(1, 60), st.integers(-300, 300), st.integers(-300, 300))
def test_sums_of_floors(n, m, a, b):
    assert floor_sum(n, m, a, b) == sum((a * i + b) // m for i in range(n))


@pytest.mark.parametrize(
    ("temperature", "shares"), [(None, [2, 1]), (1.0, [2 * 10, 90]), (2.0, [2 * 10**0.5, 90**0.5])]
)
def test_temperature(temperature, shares):
    mixture = Mixture.build({"a": 2, "b": 1}, {"a": np.arange(10), "b": np.arange(10, 100)}, (), temperature)
    assert mixture.weights == pytest.approx(np.array(shares) / sum(shares))


# A run that is stopped and goes on elsewhere, over a real table.

TASKS = {"see": "image", "look": "image", "hear": "audio", "both": "audio+image", "read": "text"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """23 samples of each task, interleaved; of two sources, the second of twice the weight."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("plan") / "train.arrow"
    with SampleWriter(path) as writer:
        for number in range(23 * len(TASKS)):
            task = list(TASKS)[number % len(TASKS)]
            ids = [1, *[5] * int(rng.integers(2, 40)), 2]
            writer.add(PreparedSample(str(number), task, TASKS[task], ids, [-100] * len(ids), [], []))
    return Source(str(path), {}, (Span(0, 1.0), Span(60, 2.0)))


mixes = st.dictionaries(st.sampled_from(list(TASKS)), st.integers(1, 3), min_size=1)
# Where a run is stopped, and the cluster that it goes on with.
lives = st.lists(
    st.tuples(st.floats(0, 1), st.integers(1, 5), st.integers(40, 400), st.sampled_from([0, 48, 200])),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("budget", ["epochs", "steps"])
@settings(max_examples=40, deadline=None)
@given(mixes, st.integers(1, 30), st.integers(1, 3), st.integers(0, 10**6), lives)
def test_kills_and_resizes(budget, source, weights, batch_size, amount, seed, clusters):
    """Nothing twice, nothing lost, whatever the clusters; two runs with one seed have the same steps."""
    steps = {"epochs": amount} if budget == "epochs" else {"steps": 9 * amount}
    order = Order(tuple(weights.items()), batch_size, seed, **steps)
    table = SampleTable(Path(source.samples))
    lengths, tasks = np.asarray(table.lengths), table.by_task()
    total = total_steps(source, order)
    done: list[list[int]] = []
    for part, world, max_tokens, row_tokens in [*clusters, (1.0, 2, 100, 0)]:
        stop = max(len(done), round(part * total))
        runs = [
            list(planned_micro_batches(source, order, Layout(r, world, max_tokens, row_tokens), range(len(done), stop)))
            for r in range(world)
        ]
        for ranks in zip(*runs, strict=True):
            rows = [row for micros in ranks for micro in micros for row in micro.tolist()]
            assert len({len(micros) for micros in ranks}) == 1
            for micros in ranks:
                tokens = sum(int(lengths[micro].sum()) for micro in micros)
                assert abs(tokens - lengths[rows].sum() / world) <= lengths[rows].max()
                for micro in micros:
                    assert len(set(table.groups[micro].tolist())) <= 1
                    assert len(micro) < 2 or padded_tokens(lengths[micro], row_tokens) <= max_tokens
            done.append(sorted(rows))
    assert len(done) == total

    if budget == "epochs":
        expected = Counter()
        for task, weight in weights.items():
            expected.update({row: weight * (1 + (row >= 60)) for row in tasks[task]})
        of_one = total // amount
        for epoch in range(amount):
            ours = done[epoch * of_one : (epoch + 1) * of_one]
            assert Counter(row for rows in ours for row in rows) == expected
            assert [len(rows) for rows in ours[:-1]] == [batch_size] * (of_one - 1)
    fresh = order.plan(SampleTable(Path(source.samples)), source.spans)
    assert done == [sorted(fresh.samples(step).tolist()) for step in range(total)]


def test_epochs_have_orders_of_their_own(source):
    plan = Order((("see", 1), ("read", 1)), 8, 0, epochs=2).plan(SampleTable(Path(source.samples)))
    assert plan.steps == 2 * 6
    first, second = (np.concatenate([plan.samples(step) for step in range(s, s + 6)]) for s in (0, 6))
    assert sorted(first.tolist()) == sorted(second.tolist()) and first.tolist() != second.tolist()
    assert [len(plan.samples(step)) for step in (5, 11)] == [6, 6]
