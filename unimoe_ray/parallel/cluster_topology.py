"""Nodes, GPUs and labels of a Ray cluster as the planner's topology, and training workers on the nodes they belong to.

A node that reads some kinds of tokens is labelled ``unimoe.io/modality=image`` or, for several, ``image-video`` (on
Kubernetes a label of the pod). Workers are asked for by label, never by node: a node that is lost can be replaced by
another with its label. Ray Train numbers ranks node by node in the order in which actors happened to start, and that
changes from start to start; so workers tell each other where they are (``gather``), and plan from that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import ray

from unimoe_ray.errors import UnimoeError
from unimoe_ray.parallel.topology import Topology

MODALITY_LABEL = "unimoe.io/modality"


@dataclass(frozen=True)
class Node:
    """label: the value of ``unimoe.io/modality``, empty if it has none."""

    id: str
    label: str
    resources: Mapping[str, float]

    def room(self, need: Mapping[str, float]) -> int:
        """Workers that fit on the whole node."""
        return min(int(self.resources.get(name, 0) / amount + 1e-9) for name, amount in need.items() if amount > 0)


@dataclass(frozen=True)
class Ranks:
    """Where the ranks of a group are. on_node: kinds of tokens that a node (as in ``topology.nodes``) is labelled with;
    node_ids: Ray's id of each node."""

    topology: Topology
    on_node: dict[int, tuple[str, ...]]
    node_ids: tuple[str, ...]

    @classmethod
    def of(cls, nodes: Sequence[tuple[str, str]], slots: Sequence[int], **link_costs: float) -> Ranks:
        """nodes: (Ray's node id, label) of each rank. Nodes are numbered by their first rank."""
        numbers = {node: number for number, node in enumerate(dict.fromkeys(node for node, _ in nodes))}
        topology = Topology(tuple(numbers[node] for node, _ in nodes), tuple(slots), **link_costs)
        return cls(topology, {numbers[node]: kinds_of(label) for node, label in nodes if label}, tuple(numbers))


def kinds_of(label: str) -> tuple[str, ...]:
    return tuple(kind for kind in label.split("-") if kind)


def cluster_nodes() -> list[Node]:
    """Nodes of the cluster that are alive, in an order of their own. Needs a connection to Ray."""
    nodes = [
        Node(node["NodeID"], node["Labels"].get(MODALITY_LABEL, ""), node["Resources"])
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(nodes, key=lambda node: (node.label, node.id))


def spread(nodes: Sequence[Node], workers: int, need: Mapping[str, float]) -> list[Node]:
    """The node of each worker, node by node: labels take turns, so that every kind of token has workers where it is
    read, and the nodes of a label fill up one after another; nodes without a label come last.

    Raises UnimoeError if the nodes have too little room.
    """
    places: dict[str, list[Node]] = {}
    for node in nodes:
        places.setdefault(node.label, []).extend([node] * node.room(need))
    others = places.pop("", [])
    turns = [node for turn in zip_longest(*(places[label] for label in sorted(places))) for node in turn if node]
    chosen = (turns + others)[:workers]
    if len(chosen) < workers:
        wanted = ", ".join(f"{amount:g} {name}" for name, amount in need.items())
        raise UnimoeError(f"{workers} workers of {wanted} each do not fit; the cluster has room for {len(chosen)}")
    return [node for node in nodes for other in chosen if other.id == node.id]


def label_selectors(workers: int, need: Mapping[str, float]) -> list[dict[str, str]] | None:
    """What Ray Train's ``ScalingConfig.label_selector`` takes, a selector per worker; None where no node that has room
    for a worker is labelled, and where nodes have yet to join."""
    nodes = [node for node in cluster_nodes() if node.room(need) > 0]
    labels = sorted({node.label for node in nodes if node.label})
    if not labels or sum(node.room(need) for node in nodes) < workers:
        return None
    others = f"!in({','.join(labels)})"
    return [{MODALITY_LABEL: node.label or others} for node in spread(nodes, workers, need)]


def gather(slots: int, **link_costs: float) -> Ranks:
    """Where all ranks of the process group are, the same on each; called by all of them, inside Ray workers. slots:
    experts of a layer that fit on this rank."""
    import torch.distributed as dist

    context = ray.get_runtime_context()
    mine = (context.get_node_id(), context.get_node_labels().get(MODALITY_LABEL, ""), slots)
    told: list[tuple[str, str, int]] = [("", "", 0)] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    return Ranks.of([(node, label) for node, label, _ in told], [count for *_, count in told], **link_costs)
