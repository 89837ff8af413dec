"""The search behind the placement planner: greedy packing with affinity, exchanges of experts, shares of replicas.

All steps run over B independent layers at once. Loads are in units of the mean rank's, so that balance is 1. Traffic is
counted by node: a token is *local* when a replica on its own node takes it. Balance is a limit, the ``cap`` on the load
of a rank; below it locality decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unimoe_ray.parallel.topology import Array, Topology

Ints = NDArray[np.int64]
EPSILON = 1e-9
# An overloaded rank holds up all others: far more costly than traffic, in the units of ``overload``.
OVERLOAD = 1e4
# Slots that an exchange looks at for one slot; it bounds the work of a pass by slots * WINDOW.
WINDOW = 512


@dataclass(frozen=True)
class Slots:
    """The S expert slots of a layer, rank by rank: rank [S], node [S], first [R] (a rank's first slot), counts [R]."""

    rank: Ints
    node: Ints
    first: Ints
    counts: Ints
    nodes: int

    @classmethod
    def of(cls, topology: Topology, counts: ArrayLike) -> Slots:
        counts = np.asarray(counts, dtype=np.int64)
        rank = np.repeat(np.arange(topology.ranks), counts)
        return cls(rank, topology.node_of[rank], np.cumsum(counts) - counts, counts, int(topology.node_of.max()) + 1)

    @property
    def ranks(self) -> int:
        return len(self.counts)

    @cached_property
    def node_ranks(self) -> Ints:
        """[N, most ranks of a node]: a node's ranks, -1 where it has fewer. Ranks without slots are on no node."""
        members = [np.unique(self.rank[self.node == node]) for node in range(self.nodes)]
        table = np.full((self.nodes, max(1, *map(len, members))), -1)
        for row, ranks in zip(table, members, strict=True):
            row[: len(ranks)] = ranks
        return table


@dataclass
class State:
    """B layers being placed. Expert E stands for an empty slot.

    traffic [B, N, E+1]: tokens from node to expert; expert [B, S]; share [B, S]: the tokens that a slot takes;
    taken [B, N, E+1]: the tokens that an expert's slots on a node take together; load [B, R].
    """

    slots: Slots
    traffic: Array
    expert: Ints
    share: Array
    taken: Array
    load: Array

    _ARRAYS: ClassVar = ("traffic", "expert", "share", "taken", "load")

    @classmethod
    def of(cls, slots: Slots, traffic: Array, expert: Ints, share: Array) -> State:
        batch, nodes, columns = traffic.shape
        taken, load = np.zeros((batch, nodes, columns)), np.zeros((batch, slots.ranks))
        rows = np.arange(batch)[:, None]
        np.add.at(taken, (rows, slots.node, expert), share)
        np.add.at(load, (rows, slots.rank), share)
        return cls(slots, traffic, expert, share, taken, load)

    def pick(self, rows: Ints) -> State:
        return State(self.slots, *(getattr(self, name)[rows] for name in self._ARRAYS))

    def put(self, rows: Ints, other: State) -> None:
        for name in self._ARRAYS:
            getattr(self, name)[rows] = getattr(other, name)

    @property
    def local(self) -> Array:
        """[B]: tokens that stay on their node."""
        return np.minimum(self.traffic, self.taken).sum(axis=(1, 2))

    @property
    def worst(self) -> Array:
        """[B]: load of the slowest rank."""
        return self.load.max(axis=1)


def replica_counts(total: Array, slots: int, ranks: int) -> Ints:
    """total [B, E] to replicas of each expert [B, E]: while there are slots, the expert with the highest load per
    replica gets one more, up to one on each rank."""
    counts, rows = np.ones(total.shape, dtype=np.int64), np.arange(len(total))
    for _ in range(slots - total.shape[1]):
        each = np.where(counts < ranks, total / counts, -1)
        hottest = each.argmax(axis=1)
        counts[rows, hottest] += each[rows, hottest] >= 0
    return counts


def pack(slots: Slots, traffic: Array, counts: Ints, affinity: Array) -> State:
    """Replicas in order of falling load, each to the rank with the lowest load, less ``affinity`` [B] times the tokens
    that become local there. Affinity 0 is longest processing time first, within the slots."""
    batch, nodes, columns = traffic.shape
    rows, total = np.arange(batch), traffic.sum(axis=1)
    each = total[:, :-1] / counts
    order = np.argsort(-each, axis=1, kind="stable")
    items = np.full((batch, int(counts.sum(axis=1).max())), columns - 1)
    for row in rows:
        replicas = np.repeat(order[row], counts[row, order[row]])
        items[row, : len(replicas)] = replicas
    weight = np.take_along_axis(np.concatenate([each, np.zeros((batch, 1))], axis=1), items, axis=1)

    expert = np.full((batch, len(slots.rank)), columns - 1)
    share, load = np.zeros(expert.shape), np.zeros((batch, slots.ranks))
    taken, used = np.zeros(traffic.shape), np.zeros((batch, slots.ranks), dtype=np.int64)
    members = slots.node_ranks
    free = np.where((members >= 0) & (slots.counts[members] > 0), 0.0, np.inf)
    # The only candidate of a node is its rank with the lowest load that has room.
    lowest, candidate = (
        np.tile(free.min(axis=1), (batch, 1)),
        np.tile(members[np.arange(nodes), free.argmin(axis=1)], (batch, 1)),
    )
    for item, tokens in zip(items.T, weight.T, strict=True):
        gain = np.minimum(traffic[rows, :, item] - taken[rows, :, item], tokens[:, None]).clip(0)
        node = (lowest - affinity[:, None] * gain).argmin(axis=1)
        rank = candidate[rows, node]
        real = item < columns - 1
        slot = slots.first[rank] + used[rows, rank]
        slot[~real] = 0
        expert[rows[real], slot[real]] = item[real]
        share[rows[real], slot[real]] = tokens[real]
        load[rows, rank] += tokens
        taken[rows, node, item] += tokens
        used[rows, rank] += real
        ranks = members[node]
        loads = np.where(
            (ranks >= 0) & (used[rows[:, None], ranks] < slots.counts[ranks]), load[rows[:, None], ranks], np.inf
        )
        best = loads.argmin(axis=1)
        lowest[rows, node], candidate[rows, node] = loads[rows, best], ranks[rows, best]
    return State.of(slots, traffic, *_merge(slots, expert, share, columns - 1))


def _merge(slots: Slots, expert: Ints, share: Array, empty: int) -> tuple[Ints, Array]:
    """Two replicas on one rank become one, which frees a slot."""
    for distance in range(int(slots.counts.max()) - 1, 0, -1):
        left, right = expert[:, :-distance], expert[:, distance:]
        same = (left == right) & (right != empty) & (slots.rank[:-distance] == slots.rank[distance:])
        share[:, :-distance] += np.where(same, share[:, distance:], 0)
        share[:, distance:][same] = 0
        right[same] = empty
    return expert, share


def exchange(state: State, cap: Array, *, home: NDArray[np.bool_] | None = None, move_cost: ArrayLike = 0.0) -> bool:
    """One pass over all slots: each changes places with the slot that is best for it, an empty one included, if that
    lowers the loads above ``cap`` [B] or, those being equal, makes more tokens local. Returns whether anything moved.

    home [B, R, E+1]: where experts lie now; a move away from there costs ``move_cost`` [B] local tokens, and back earns
    it.
    """
    slots, expert, share, load = state.slots, state.expert, state.share, state.load
    batch, _, columns = state.traffic.shape
    count, rows, limit = len(slots.rank), np.arange(batch), cap[:, None]
    # By node and by rank first, so that what a node or a rank has lies together.
    traffic, taken = (np.ascontiguousarray(array.transpose(1, 0, 2)) for array in (state.traffic, state.taken))
    held = np.zeros((slots.ranks, batch, columns), dtype=bool)
    held[slots.rank, rows[:, None], expert] = True
    held[:, :, -1] = False
    flat = rows[:, None] * columns + expert
    lost = _local_loss(slots, traffic, taken, expert, share, rows)
    moved = False
    for slot in range(count):
        window = _window(slot, count)
        rank, node, ranks, nodes = slots.rank[slot], slots.node[slot], slots.rank[window], slots.node[window]
        mine, tokens, theirs, others = expert[:, slot], share[:, slot, None], share[:, window], flat[:, window]
        there, had = traffic[:, rows, mine].T, taken[:, rows, mine].T
        local = (np.minimum(there, had + tokens) - np.minimum(there, had))[:, nodes]
        here, had = traffic[node].take(others), taken[node].take(others)
        local += np.minimum(here, had + theirs) - np.minimum(here, had)
        local -= lost[:, slot, None] + lost[:, window]
        local[:, nodes == node] = 0

        old_mine, old_theirs = load[:, rank, None], load[:, ranks]
        new_mine, new_theirs = old_mine - tokens + theirs, old_theirs + tokens - theirs
        over = _square(new_mine - limit) + _square(new_theirs - limit)
        over -= _square(old_mine - limit) + _square(old_theirs - limit)
        score = local - OVERLOAD * over
        if home is not None:
            stays = home[rows, :, mine][:, ranks].astype(float) + home[:, rank].take(others)
            stays -= home[rows, rank, mine][:, None]
            stays -= home[rows[:, None], ranks, expert[:, window]]
            score += np.reshape(move_cost, (-1, 1)) * stays
        forbidden = held[:, rows, mine].T[:, ranks] | held[rank].take(others) | (ranks == rank)
        forbidden |= np.maximum(new_mine, new_theirs) > np.maximum(limit, np.maximum(old_mine, old_theirs)) + EPSILON
        score[forbidden] = -np.inf
        best = score.argmax(axis=1)
        chosen = np.flatnonzero(score[rows, best] > EPSILON)
        if not len(chosen):
            continue
        moved = True
        other = window[best[chosen]]
        for source, target in ((slot, other), (other, slot)):
            moving, amount = expert[chosen, source], share[chosen, source]
            for where, sign in ((source, -1), (target, 1)):
                taken[slots.node[where], chosen, moving] += sign * amount
                load[chosen, slots.rank[where]] += sign * amount
                held[slots.rank[where], chosen, moving] = sign > 0
        held[:, chosen, -1] = False
        for array in (expert, share, flat):
            array[chosen, slot], array[chosen, other] = array[chosen, other], array[chosen, slot]
        lost[chosen] = _local_loss(slots, traffic, taken, expert, share, chosen)
    state.taken = np.ascontiguousarray(taken.transpose(1, 0, 2))
    return moved


def _window(slot: int, count: int) -> Ints:
    """The slots that one slot may change places with: all, or WINDOW of them, evenly spread, others for each slot."""
    return np.arange(count) if count <= WINDOW else (slot + 1 + np.arange(WINDOW) * (count // WINDOW)) % count


def _square(excess: Array) -> Array:
    return np.square(np.maximum(excess, 0))


def _local_loss(slots: Slots, traffic: Array, taken: Array, expert: Ints, share: Array, rows: Ints) -> Array:
    """[len(rows), S]: the local tokens that would be lost with each slot; traffic and taken are [N, B, E+1]."""
    at = (slots.node, rows[:, None], expert[rows])
    here, had = traffic[at], taken[at]
    return np.minimum(here, had) - np.minimum(here, had - share[rows])


def reshare(state: State, cap: Array) -> None:
    """The parts that an expert's replicas take of its tokens, expert by expert: their own nodes' tokens first, within
    the cap, then the rest by what room there is. Where there is not enough, loads above the cap become level."""
    slots, rows = state.slots, np.arange(len(state.load))
    groups = replica_groups(state.expert, state.traffic.shape[2] - 1)
    for group in np.moveaxis(groups, 1, 0):
        valid = group >= 0
        at = np.where(valid, group, 0)
        expert = np.where(valid.any(axis=1), state.expert[rows, at[:, 0]], -1)
        rank, node = slots.rank[at], slots.node[at]
        old = np.where(valid, state.share[rows[:, None], at], 0)
        room = np.where(valid, cap[:, None] - state.load[rows[:, None], rank] + old, -np.inf)
        same_node = ((node[:, :, None] == node[:, None, :]) & valid[:, None, :]).sum(axis=2)
        own = np.where(valid, state.traffic[rows[:, None], node, expert[:, None]] / np.maximum(same_node, 1), 0)
        new = np.minimum(own, room).clip(0)
        left = old.sum(axis=1, keepdims=True) - new.sum(axis=1, keepdims=True)
        spare = np.maximum(room - new, 0)
        new += spare * np.minimum(left / np.maximum(spare.sum(axis=1, keepdims=True), EPSILON), 1)
        left = old.sum(axis=1, keepdims=True) - new.sum(axis=1, keepdims=True)
        new += _level(new - room, left)
        change = np.where(valid, new - old, 0)
        np.add.at(state.share, (rows[:, None], at), change)
        np.add.at(state.load, (rows[:, None], rank), change)
        np.add.at(state.taken, (rows[:, None], node, expert[:, None]), change)


def _level(heights: Array, amount: Array) -> Array:
    """What to pour on ``heights`` [B, C] so that ``amount`` [B, 1] lies level on the lowest; infinite ones get none."""
    ordered = np.sort(heights, axis=1)
    finite = np.where(np.isfinite(ordered), ordered, 0)
    counts = np.arange(1, heights.shape[1] + 1)
    levels = (amount + np.cumsum(finite, axis=1)) / counts
    fits = np.isfinite(ordered) & (levels >= ordered)
    level = np.take_along_axis(levels, np.maximum(fits.sum(axis=1, keepdims=True) - 1, 0), axis=1)
    return np.where(amount > EPSILON, np.maximum(level - heights, 0), 0)


def replica_groups(expert: Ints, empty: int) -> Ints:
    """[B, Q, C]: the slots of each expert with several replicas, -1 where there are fewer experts or replicas."""
    batch, count = expert.shape
    order = np.argsort(expert, axis=1, kind="stable")
    ordered = np.take_along_axis(expert, order, axis=1)
    starts = np.concatenate([np.ones((batch, 1), bool), ordered[:, 1:] != ordered[:, :-1]], axis=1)
    run = np.cumsum(starts, axis=1) - 1
    position = np.arange(count) - np.maximum.accumulate(np.where(starts, np.arange(count), 0), axis=1)
    sizes = np.zeros((batch, count), dtype=np.int64)
    rows = np.arange(batch)[:, None]
    np.add.at(sizes, (rows, run), ordered != empty)
    several = sizes > 1
    number = np.cumsum(several, axis=1) - 1
    groups = np.full((batch, int(several.sum(axis=1).max()), max(int(sizes.max()), 1)), -1)
    row, column = np.nonzero(np.take_along_axis(several, run, axis=1) & (ordered != empty))
    groups[row, number[row, run[row, column]], position[row, column]] = order[row, column]
    return groups
