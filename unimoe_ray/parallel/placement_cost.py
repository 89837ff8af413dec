"""What a placement costs: balance, traffic between nodes, seconds of a step, bytes to move. Pure functions.

The model. A token goes to one replica of each of its K experts. Which one: every node sends parts of an expert's tokens
to its replicas (``split``), chosen for given loads: to replicas on its own node first, as far as no rank gets more than
its part of the balanced load, the rest to where there is room. A rank computes one token after another, all ranks
wait for the slowest, and dispatch and return take as long as for the rank with the most bytes on its links.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unimoe_ray.parallel.placement_search import EPSILON, Ints, Slots, State, reshare
from unimoe_ray.parallel.topology import Array, Loads, Placement, Topology

# Rounds over all replicated experts; balance and traffic change by less than a thousandth after these.
ROUNDS = 5


@dataclass(frozen=True)
class Work:
    """What one routed token and one expert cost. token_bytes: sent per routed token in a step, there and back,
    backward included; token_seconds: in an expert of a rank; expert_bytes: what moves with an expert, optimizer state
    included."""

    token_bytes: float
    token_seconds: float
    expert_bytes: float

    @classmethod
    def of(
        cls, hidden_size: int, intermediate_size: int, *, tflops: float, value_bytes: int = 2, training: bool = True
    ) -> Work:
        """SwiGLU experts on ranks that reach ``tflops``; training: forward and backward, fp32 master weights and two
        Adam moments move too."""
        parameters = 3 * hidden_size * intermediate_size
        passes = 3 if training else 1
        return cls(
            token_bytes=2 * hidden_size * value_bytes * (2 if training else 1),
            token_seconds=2 * parameters * passes / (tflops * 1e12),
            expert_bytes=parameters * (value_bytes + (12 if training else 0)),
        )


@dataclass(frozen=True)
class Flows:
    """Tokens of each layer: load [L, R] that ranks compute; sent, received [L, R] by ranks over the links between
    nodes; nearby [L, R] received from other ranks of the same node; crossing [L, N, N] from node to node."""

    load: Array
    sent: Array
    received: Array
    nearby: Array
    crossing: Array


def normalised(loads: Loads, topology: Topology) -> tuple[Array, Array]:
    """Traffic [L, N, E+1] in units of the mean rank's load, and that load in tokens [L]. A layer without any tokens is
    as good as one with equal loads. Column E is for empty slots."""
    by_node = loads.by_node(topology)
    mean = by_node.sum(axis=(1, 2)) / topology.ranks
    by_node[mean == 0] = 1
    scale = by_node.sum(axis=(1, 2), keepdims=True) / topology.ranks
    return np.concatenate([by_node / scale, np.zeros((*by_node.shape[:2], 1))], axis=2), mean


def slot_table(placement: Placement, experts: int, topology: Topology) -> tuple[Slots, Ints]:
    """The slots in use and the expert in each [L, S], ``experts`` where a layer has none."""
    ranks = range(topology.ranks)
    width = tuple(max(len(layer[rank]) for layer in placement.layers) for rank in ranks)
    slots = Slots.of(topology, width)
    table = np.full((len(placement.layers), len(slots.rank)), experts)
    for row, layer in zip(table, placement.layers, strict=True):
        for rank, held in enumerate(layer):
            row[slots.first[rank] : slots.first[rank] + len(held)] = held
    return slots, table


def even_state(slots: Slots, traffic: Array, expert: Ints) -> State:
    """Each replica takes an equal part of its expert's tokens."""
    columns = traffic.shape[2]
    rows = np.arange(len(expert))[:, None]
    counts = np.zeros((len(expert), columns))
    np.add.at(counts, (rows, expert), 1)
    each = traffic.sum(axis=1) / np.maximum(counts, 1)
    return State.of(slots, traffic, expert, each[rows, expert])


def settle(state: State, slack: float = 0.0) -> None:
    """Share the tokens of replicated experts: as balanced as can be, then as local as that and ``slack`` allow."""
    for _ in range(ROUNDS):
        reshare(state, np.ones(len(state.load)))
    for _ in range(ROUNDS):
        reshare(state, np.maximum(state.worst, 1 + slack))


def parts(state: State) -> Array:
    """[L, N, S]: the part of each node's tokens for a slot's expert that goes to the slot; adds up to 1 per expert."""
    slots, rows = state.slots, np.arange(len(state.load))[:, None]
    supply, demand = np.maximum(state.traffic - state.taken, 0), np.maximum(state.taken - state.traffic, 0)
    at = (rows, slots.node, state.expert)
    of_node = state.share / np.maximum(state.taken[at], EPSILON)
    own = np.minimum(state.traffic, state.taken)[at] * of_node
    wanted = demand[at] * of_node
    all_wanted = np.maximum(demand.sum(axis=1)[rows, state.expert], EPSILON)
    sent = supply[rows, :, state.expert].transpose(0, 2, 1) * (wanted / all_wanted)[:, None]
    for node in range(slots.nodes):
        sent[:, node] += np.where(slots.node == node, own, 0)
    # A node that had no token for an expert sends later ones as all nodes together do.
    total = state.traffic.sum(axis=1)[rows, state.expert]
    counts = np.zeros((len(rows), state.traffic.shape[2]))
    np.add.at(counts, (rows, state.expert), 1)
    overall = np.where(total > EPSILON, state.share / np.maximum(total, EPSILON), 1 / counts[rows, state.expert])
    sums = np.zeros_like(state.traffic)
    np.add.at(sums, (rows[:, :, None], np.arange(slots.nodes)[:, None], state.expert[:, None]), sent)
    sums = sums[rows[:, :, None], np.arange(slots.nodes)[:, None], state.expert[:, None]]
    result = np.where(sums > EPSILON, sent / np.maximum(sums, EPSILON), overall[:, None])
    return np.where((state.expert == state.traffic.shape[2] - 1)[:, None], 0, result)


def split(placement: Placement, loads: Loads, topology: Topology, slack: float = 0.0) -> Array:
    """[L, N, S] for the slots of ``slot_table``: the part of each node's tokens for the slot's expert that it takes.

    It is what a dispatcher needs for replicated experts. Nothing moves when it changes, so it may follow the loads much
    closer than the placement does. slack: how far a rank may be above the mean to keep tokens on their node. Without
    replicas all ones.
    """
    state = _even(placement, loads, topology)
    settle(state, slack)
    return parts(state)


def even_split(placement: Placement, loads: Loads, topology: Topology) -> Array:
    """``split`` where each replica takes an equal part of its expert's tokens, those of its own node first."""
    return parts(_even(placement, loads, topology))


def _even(placement: Placement, loads: Loads, topology: Topology) -> State:
    slots, expert = slot_table(placement, loads.experts, topology)
    return even_state(slots, normalised(loads, topology)[0], expert)


def flows(placement: Placement, loads: Loads, topology: Topology, split_: Array | None = None) -> Flows:
    """``split_``: how tokens were to be split when the placement was planned; for these loads if not given."""
    given = split(placement, loads, topology) if split_ is None else split_
    slots, expert = slot_table(placement, loads.experts, topology)
    by_node = np.concatenate([loads.by_node(topology), np.zeros((loads.layers, slots.nodes, 1))], axis=2)
    tokens = np.concatenate([loads.tokens, np.zeros((*loads.tokens.shape[:2], 1))], axis=2)
    node_of, ranks = topology.node_of, topology.ranks
    shape = (loads.layers, ranks)
    load, sent, received, nearby = (np.zeros(shape) for _ in range(4))
    crossing = np.zeros((loads.layers, slots.nodes, slots.nodes))
    local = slots.node == np.arange(slots.nodes)[:, None]
    for layer in range(loads.layers):
        flow = by_node[layer][:, expert[layer]] * given[layer]
        load[layer] = np.bincount(slots.rank, flow.sum(axis=0), ranks)
        received[layer] = np.bincount(slots.rank, np.where(local, 0, flow).sum(axis=0), ranks)
        np.add.at(crossing[layer].T, slots.node, flow.T)
        remote = np.zeros(by_node[layer].shape)
        np.add.at(remote.T, expert[layer], np.where(local, 0, given[layer]).T)
        # [G, N]: what group g would send away if node n read it.
        away = tokens[layer] @ remote.T
        sent[layer] = (loads.readers * away[:, node_of]).sum(axis=0)
        own = (tokens[layer][:, expert[layer]] * loads.readers[:, slots.rank]).sum(axis=0)
        own = own * given[layer][slots.node, np.arange(len(slots.node))]
        nearby[layer] = np.bincount(slots.rank, np.where(local, flow, 0).sum(axis=0) - own, ranks)
    crossing[:, np.arange(slots.nodes), np.arange(slots.nodes)] = 0
    return Flows(load, sent, received, nearby.clip(0), crossing)


def imbalance_of(flows_: Flows) -> Array:
    """[L]: load of the slowest rank over the mean; 1 for a layer without tokens."""
    mean = flows_.load.mean(axis=1)
    return np.where(mean > 0, flows_.load.max(axis=1) / np.where(mean > 0, mean, 1), 1.0)


def imbalance(placement: Placement, loads: Loads, topology: Topology, split_: Array | None = None) -> float:
    """Mean over layers of the slowest rank's load over the mean rank's: 1 at best, R at worst."""
    return float(imbalance_of(flows(placement, loads, topology, split_)).mean())


def cross_node_bytes(
    placement: Placement, loads: Loads, topology: Topology, work: Work, split_: Array | None = None
) -> float:
    """Bytes that all layers send between nodes in a step."""
    return float(flows(placement, loads, topology, split_).received.sum() * work.token_bytes)


def layer_seconds(flows_: Flows, topology: Topology, work: Work) -> Array:
    """[L]: seconds of each layer's experts and exchanges in a step."""
    links = topology.inter_cost * np.maximum(flows_.sent, flows_.received) + topology.intra_cost * flows_.nearby
    return flows_.load.max(axis=1) * work.token_seconds + links.max(axis=1) * work.token_bytes


def predicted_step_cost(
    placement: Placement, loads: Loads, topology: Topology, work: Work, split_: Array | None = None
) -> float:
    """Seconds of a step that experts and exchanges take; ``loads`` are the tokens of a step."""
    return float(layer_seconds(flows(placement, loads, topology, split_), topology, work).sum())


def moves(old: Placement, new: Placement) -> list[list[tuple[int, int]]]:
    """Of each layer: (expert, rank) for every expert that a rank did not hold and now does."""
    return [
        [
            (e, rank)
            for rank, (had, has) in enumerate(zip(before, after, strict=True))
            for e in sorted(set(has) - set(had))
        ]
        for before, after in zip(old.layers, new.layers, strict=True)
    ]


def migration_seconds(old: Placement, new: Placement, topology: Topology, work: Work) -> Array:
    """[L]: seconds to move each layer's experts, those of a layer all at once: the rank that receives most decides.
    An expert comes from its own node where a replica lay there."""
    seconds = np.zeros(len(old.layers))
    for layer, moved in enumerate(moves(old, new)):
        received = np.zeros(topology.ranks)
        holders: dict[int, set[int]] = {}
        for rank, held in enumerate(old.layers[layer]):
            for expert in held:
                holders.setdefault(expert, set()).add(topology.nodes[rank])
        for expert, rank in moved:
            near = topology.nodes[rank] in holders[expert]
            received[rank] += work.expert_bytes * (topology.intra_cost if near else topology.inter_cost)
        seconds[layer] = received.max()
    return seconds


def migration_bytes(old: Placement, new: Placement, work: Work) -> float:
    return sum(map(len, moves(old, new))) * work.expert_bytes


def gain(
    new: Placement, old: Placement, loads: Loads, topology: Topology, work: Work, steps: int | None = None
) -> float:
    """The part of the predicted step cost that ``new`` saves over ``old``; negative if it costs more. With ``steps``
    the time to move there counts too, spread over that many steps."""
    before = predicted_step_cost(old, loads, topology, work)
    after = predicted_step_cost(new, loads, topology, work)
    if steps is not None:
        after += float(migration_seconds(old, new, topology, work).sum()) / steps
    return 1 - after / before if before > 0 else 0.0
