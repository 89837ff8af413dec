"""The placement planner: who holds which expert, from the loads, the nodes and the memory of the ranks.

Pure and deterministic: every rank that plans from the same numbers gets the same placement. Per layer, balance is a
limit and traffic between nodes is what is minimised:

1. With replicas, the spare slots go to the experts with the highest load per replica.
2. Packing by falling load without regard to nodes (longest processing time first) tells what balance is possible. The
   limit on a rank's load is that, but not more than 2 % above the mean; or it is given.
3. Packing again with affinity: a rank's load counts less where the expert's tokens are read on its node.
4. Passes of exchanges and of sharing out the tokens of replicas, first below the limit, then towards less traffic.
5. Within a node, ranks swap what they hold so that tokens stay on their rank.

The work of a layer is about S * (N + R / N + min(S, 512)) for S slots on R ranks of N nodes: linear for many slots.
"""

from __future__ import annotations

import numpy as np

from unimoe_ray.errors import UsageError
from unimoe_ray.parallel.placement_cost import (
    Work,
    even_state,
    flows,
    layer_seconds,
    migration_seconds,
    normalised,
    settle,
)  # fmt: skip
from unimoe_ray.parallel.placement_search import EPSILON, Ints, Slots, State, exchange, pack, replica_counts, reshare
from unimoe_ray.parallel.topology import Array, Loads, Placement, Topology

# Balance that is given up for traffic by default, and only where packing for balance would give up as much.
SLACK = 0.02
# How much a token that stays on its node counts beside a token of load, when packing.
AFFINITY = 2.0
PASSES = 2


def plan(loads: Loads, topology: Topology, *, replicas: bool = False, slack: float | None = None) -> Placement:
    """The placement of ``loads.experts`` experts of each layer on the ranks of ``topology``.

    replicas: fill spare slots with second places of hot experts; slack: what the slowest rank may have above the mean
    rank's load, as a part of it, to save traffic; without it balance is never worse than that of plain
    packing. Raises UsageError if the experts do not fit into the slots.
    """
    traffic, _ = normalised(loads, topology)
    slots = _slots(loads.experts, topology)
    counts = _counts(traffic, slots, topology, replicas)
    state = _search(slots, traffic, counts, slack)
    return _placement(state.expert, slots, loads, topology, _keep_tokens_on_ranks(state, loads))


def replan(
    current: Placement,
    loads: Loads,
    topology: Topology,
    work: Work,
    *,
    steps: int,
    replicas: bool = False,
    slack: float | None = None,
) -> Placement:
    """A placement to go to from ``current``: each layer keeps its own, or changes a few places of it, or takes those of
    a new plan, whichever costs the fewest seconds over ``steps`` steps, moving included. ``loads`` are of one step.

    Ranks of a node that would only change names with each other do not move anything.
    """
    current.check(loads.experts, topology, replicas=replicas)
    traffic, mean = normalised(loads, topology)
    slots = _slots(loads.experts, topology)
    held = np.full((loads.layers, len(slots.rank)), loads.experts)
    for row, layer in zip(held, current.layers, strict=True):
        for rank, experts in enumerate(layer):
            row[slots.first[rank] : slots.first[rank] + len(experts)] = experts
    home = np.zeros((loads.layers, topology.ranks, loads.experts + 1), dtype=bool)
    home[np.arange(loads.layers)[:, None], slots.rank, held] = True
    home[:, :, -1] = False

    counts = _counts(traffic, slots, topology, replicas)
    cap = _limit(pack(slots, traffic, counts, np.zeros(loads.layers)), counts, slack)
    near = even_state(slots, traffic, held.copy())
    # A move costs what its bytes cost, in tokens per step and in units of the mean rank's load.
    move_cost = work.expert_bytes / (steps * work.token_bytes) / np.maximum(mean, EPSILON)
    for _ in range(PASSES):
        reshare(near, cap)
        if not exchange(near, cap, home=home, move_cost=move_cost):
            break
    fresh = _search(slots, traffic, counts, slack)
    overlap = np.stack(
        [home[:, rank][np.arange(loads.layers)[:, None], fresh.expert] for rank in range(topology.ranks)], 1
    )
    candidates = [
        current,
        _placement(near.expert, slots, loads, topology, None),
        _placement(fresh.expert, slots, loads, topology, _sum_by_rank(overlap, slots)),
    ]
    costs = [
        steps * layer_seconds(flows(candidate, loads, topology), topology, work)
        + migration_seconds(current, candidate, topology, work)
        for candidate in candidates
    ]
    best = np.argmin(costs, axis=0)
    return Placement(tuple(candidates[choice].layers[layer] for layer, choice in enumerate(best)))


def _slots(experts: int, topology: Topology) -> Slots:
    slots = Slots.of(topology, np.minimum(topology.slots, experts))
    if len(slots.rank) < experts:
        raise UsageError(
            f"{experts} experts do not fit into {sum(topology.slots)} slots on {topology.ranks} ranks; "
            f"allowed: at least {-(-experts // topology.ranks)} slots per rank"
        )
    return slots


def _counts(traffic: Array, slots: Slots, topology: Topology, replicas: bool) -> Ints:
    total = traffic.sum(axis=1)[:, :-1]
    usable = len(slots.rank) if replicas else total.shape[1]
    return replica_counts(total, usable, int((slots.counts > 0).sum()))


def _limit(packed: State, counts: Ints, slack: float | None) -> Array:
    """[L]: the load that a rank may have. Never below that of the hottest replica, which no placement can beat."""
    hottest = (packed.traffic.sum(axis=1)[:, :-1] / counts).max(axis=1)
    return np.maximum(hottest, np.minimum(1 + SLACK, packed.worst) if slack is None else 1 + slack)


def _search(slots: Slots, traffic: Array, counts: Ints, slack: float | None) -> State:
    layers = len(traffic)
    balanced = pack(slots, traffic, counts, np.zeros(layers))
    cap = _limit(balanced, counts, slack)
    state = _improve(pack(slots, traffic, counts, np.full(layers, AFFINITY)), cap, slack)
    # Where affinity led to ranks above the limit that nothing brought down, the balanced packing is the better start,
    # and at worst the result.
    failed = np.flatnonzero(state.worst > np.maximum(cap, balanced.worst) + EPSILON)
    if len(failed):
        for other in (_improve(balanced.pick(failed), cap[failed], slack), balanced.pick(failed)):
            better = np.flatnonzero(other.worst < state.worst[failed])
            state.put(failed[better], other.pick(better))
    return state


def _improve(state: State, cap: Array, slack: float | None) -> State:
    for _ in range(PASSES):
        reshare(state, cap)
        if not exchange(state, cap):
            break
    settle(state, slack or 0.0)
    return state


def _keep_tokens_on_ranks(state: State, loads: Loads) -> Array:
    """[L, R, R]: tokens that stay on rank r if it holds what the plan gave to rank p, by p and r."""
    total = np.maximum(state.traffic.sum(axis=1), EPSILON)
    part = state.share / np.take_along_axis(total, state.expert, axis=1)
    tokens = np.concatenate([loads.tokens, np.zeros((*loads.tokens.shape[:2], 1))], axis=2)
    by_group = np.take_along_axis(tokens, state.expert[:, None], axis=2) * part[:, None]
    return _sum_by_rank(by_group, state.slots) @ loads.readers


def _sum_by_rank(values: Array, slots: Slots) -> Array:
    """[L, A, S] to [L, R, A] of sums over each rank's slots."""
    sums = np.zeros((len(values), len(slots.counts), values.shape[1]))
    np.add.at(sums.transpose(1, 0, 2), slots.rank, values.transpose(2, 0, 1))
    return sums


def _placement(expert: Ints, slots: Slots, loads: Loads, topology: Topology, score: Array | None) -> Placement:
    """score [L, R, R] by p and r: the worth of rank r holding what rank p has been given; it decides among the equal
    ranks of a node."""
    layers = np.arange(len(expert))
    source = np.tile(np.arange(topology.ranks), (len(expert), 1))
    if score is not None:
        kinds = list(zip(topology.nodes, topology.slots, strict=True))
        for kind in dict.fromkeys(kinds):
            ranks = np.array([rank for rank, other in enumerate(kinds) if other == kind])
            left = score[:, ranks[:, None], ranks].astype(float)
            for _ in ranks:
                pack_, rank = np.divmod(left.reshape(len(layers), -1).argmax(axis=1), len(ranks))
                source[layers, ranks[rank]] = ranks[pack_]
                left[layers, pack_], left[layers, :, rank] = -1, -1
    held = [np.split(row, slots.first[1:]) for row in expert]
    return Placement.of(
        [[[e for e in packs[p] if e < loads.experts] for p in row] for packs, row in zip(held, source, strict=True)]
    )
