"""DeepSeek's EPLB (Expert Parallelism Load Balancer), reimplemented from its public description.

Redundant experts: again and again the expert with the highest load per replica gets one more. Packing: items in order
of falling load, each to the pack with the lowest load that has room, all packs equal in number. The *global* policy
replicates over all ranks and packs replicas to ranks; the *hierarchical* one packs groups of experts to nodes,
replicates within each node, and packs to the node's ranks. A replica takes an equal part of its expert's tokens.
"""

from __future__ import annotations

import numpy as np

from unimoe_ray.parallel.topology import Array, Placement


def pack(weights: Array, packs: int) -> np.ndarray:
    """weights [L, I] to the pack of each item [L, I]; I / packs items in each."""
    layers, items = weights.shape
    room = items // packs
    order = np.argsort(-weights, axis=1, kind="stable")
    loads, counts = np.zeros((layers, packs)), np.zeros((layers, packs), dtype=int)
    result, rows = np.empty((layers, items), dtype=int), np.arange(layers)
    for item in order.T:
        chosen = np.where(counts < room, loads, np.inf).argmin(axis=1)
        result[rows, item] = chosen
        loads[rows, chosen] += weights[rows, item]
        counts[rows, chosen] += 1
    return result


def replicate(weights: Array, slots: int) -> tuple[np.ndarray, Array]:
    """weights [L, E] to the expert of each replica [L, slots] and the replica's load [L, slots]."""
    layers, experts = weights.shape
    replicas, rows = np.ones((layers, experts)), np.arange(layers)
    extra = []
    for _ in range(slots - experts):
        hottest = (weights / replicas).argmax(axis=1)
        replicas[rows, hottest] += 1
        extra.append(hottest)
    expert = np.concatenate(
        [np.tile(np.arange(experts), (layers, 1)), np.array(extra, dtype=int).reshape(-1, layers).T], 1
    )
    return expert, np.take_along_axis(weights / replicas, expert, axis=1)


def eplb_global(weights: Array, slots: int, ranks: int) -> Placement:
    """weights [L, E]: tokens of each expert."""
    expert, load = replicate(weights, slots)
    return _placement(expert, pack(load, ranks), ranks)


def eplb_hierarchical(weights: Array, slots: int, ranks: int, nodes: int, groups: int) -> Placement:
    """groups: contiguous groups of experts, as many for each node. Ranks are numbered node by node."""
    layers, experts = weights.shape
    size = experts // groups
    node = pack(weights.reshape(layers, groups, size).sum(axis=2), nodes).repeat(size, axis=1)
    per_node = ranks // nodes
    parts = []
    for n in range(nodes):
        mine = np.argsort(node != n, axis=1, kind="stable")[:, : experts // nodes]
        local, load = replicate(np.take_along_axis(weights, mine, axis=1), slots // nodes)
        parts.append(_placement(np.take_along_axis(mine, local, axis=1), pack(load, per_node), per_node).layers)
    return Placement.of([[held for part in parts for held in part[layer]] for layer in range(layers)])


def _placement(expert: np.ndarray, rank: np.ndarray, ranks: int) -> Placement:
    """A rank may get two replicas of an expert; both stand in its list."""
    return Placement.of([[e[r == k].tolist() for k in range(ranks)] for e, r in zip(expert, rank, strict=True)])
