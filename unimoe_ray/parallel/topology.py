"""What expert placement is about: ranks on nodes, the tokens that they send to experts, and who holds which expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unimoe_ray.errors import UsageError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Topology:
    """The R ranks of an expert-parallel group.

    nodes [R]: the node of each rank, any integers; slots [R]: experts of a layer that fit into each rank's memory;
    inter_cost, intra_cost: seconds per byte that a rank sends to another node, to another rank of its own node.
    """

    nodes: tuple[int, ...]
    slots: tuple[int, ...]
    inter_cost: float = 1 / 25e9
    intra_cost: float = 1 / 200e9

    def __post_init__(self) -> None:
        if not self.nodes or len(self.nodes) != len(self.slots):
            raise UsageError(
                f"{len(self.nodes)} ranks have nodes and {len(self.slots)} have slots; both need each rank"
            )
        if min(self.slots) < 0:
            raise UsageError(
                f"rank {self.slots.index(min(self.slots))} has {min(self.slots)} expert slots; allowed: from 0"
            )

    @classmethod
    def even(cls, ranks: int, nodes: int, slots: int, **costs: float) -> Topology:
        """Equal ranks, numbered node by node."""
        if not 1 <= nodes <= ranks:
            raise UsageError(f"{ranks} ranks cannot lie on {nodes} nodes; allowed: 1 to {ranks} nodes")
        return cls(tuple(rank * nodes // ranks for rank in range(ranks)), (slots,) * ranks, **costs)

    @property
    def ranks(self) -> int:
        return len(self.nodes)

    @property
    def node_of(self) -> NDArray[np.int64]:
        """[R]: nodes numbered 0..N-1 in the order of their first rank."""
        numbers: dict[int, int] = {}
        return np.array([numbers.setdefault(node, len(numbers)) for node in self.nodes])


@dataclass(frozen=True)
class Loads:
    """Routed tokens (each token counts once for each of its K experts), by source.

    tokens [L, G, E]: of each layer, from source group g to expert e; readers [G, R]: the part of group g's tokens that
    rank r holds, rows add up to 1. Groups are ranks, modalities, or one group of everything: see the constructors.
    """

    tokens: Array
    readers: Array
    groups: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        tokens, readers = self.tokens, self.readers
        if tokens.ndim != 3 or readers.ndim != 2 or tokens.shape[1] != readers.shape[0] or 0 in tokens.shape:
            raise UsageError(f"loads {tokens.shape} and readers {readers.shape} are not [L, G, E] and [G, R]")
        for name, values in (("loads", tokens), ("readers", readers)):
            if not np.isfinite(values).all() or (values < 0).any():
                raise UsageError(f"{name} have values that are negative or not finite")
        if (readers.sum(axis=1) <= 0).any():
            raise UsageError(f"no rank reads group {int(np.argmax(readers.sum(axis=1) <= 0))} of the loads")

    @classmethod
    def by_expert(cls, tokens: ArrayLike, ranks: int) -> Loads:
        """tokens [L, E], from all ranks alike."""
        array = np.asarray(tokens, dtype=np.float64)
        if array.ndim != 2:
            raise UsageError(f"loads {array.shape} are not [L, E]")
        return cls(array[:, None], np.full((1, ranks), 1 / ranks))

    @classmethod
    def by_rank(cls, tokens: ArrayLike) -> Loads:
        """tokens [L, R, E]."""
        array = np.asarray(tokens, dtype=np.float64)
        if array.ndim != 3:
            raise UsageError(f"loads {array.shape} are not [L, R, E]")
        return cls(array, np.eye(array.shape[1]))

    @classmethod
    def by_modality(cls, tokens: ArrayLike, readers: ArrayLike, names: Sequence[str] = ()) -> Loads:
        """tokens [L, M, E] and readers [M, R]: how much of each modality each rank reads, in any unit."""
        readers = np.asarray(readers, dtype=np.float64)
        if readers.ndim != 2:
            raise UsageError(f"readers {readers.shape} are not [M, R]")
        with np.errstate(invalid="ignore", divide="ignore"):
            parts = readers / readers.sum(axis=1, keepdims=True)
        parts[readers.sum(axis=1) == 0] = 0
        return cls(np.asarray(tokens, dtype=np.float64), parts, tuple(names))

    @property
    def layers(self) -> int:
        return self.tokens.shape[0]

    @property
    def experts(self) -> int:
        return self.tokens.shape[2]

    @property
    def ranks(self) -> int:
        return self.readers.shape[1]

    def by_node(self, topology: Topology) -> Array:
        """[L, N, E]: tokens from each node to each expert."""
        if self.ranks != topology.ranks:
            raise UsageError(f"loads are of {self.ranks} ranks, the topology has {topology.ranks}")
        on_node = np.eye(max(topology.node_of) + 1)[topology.node_of]
        return np.matmul((self.readers @ on_node).T, self.tokens)


@dataclass(frozen=True)
class Placement:
    """layers[l][r]: global ids of the experts that rank r holds in layer l, ascending. Plain data, for JSON too."""

    layers: tuple[tuple[tuple[int, ...], ...], ...]

    @classmethod
    def of(cls, layers: Sequence[Sequence[Sequence[int]]]) -> Placement:
        return cls(tuple(tuple(tuple(sorted(int(e) for e in held)) for held in ranks) for ranks in layers))

    @property
    def experts(self) -> int:
        return 1 + max(expert for ranks in self.layers for held in ranks for expert in held)

    def check(self, experts: int, topology: Topology, *, replicas: bool = False) -> None:
        """Raises UsageError unless every expert has a place in every layer (exactly one without replicas) and no rank
        holds more experts than it has slots for, or one of them twice."""
        for layer, ranks in enumerate(self.layers):
            if len(ranks) != topology.ranks:
                raise UsageError(f"layer {layer}: placed over {len(ranks)} ranks, the topology has {topology.ranks}")
            for rank, (held, slots) in enumerate(zip(ranks, topology.slots, strict=True)):
                if len(held) > slots:
                    raise UsageError(f"layer {layer}: rank {rank} holds {len(held)} experts, but has {slots} slots")
                if len(set(held)) < len(held):
                    raise UsageError(f"layer {layer}: rank {rank} holds an expert twice")
            counts = np.bincount([expert for held in ranks for expert in held], minlength=experts)
            if len(counts) > experts:
                raise UsageError(f"layer {layer}: expert {len(counts) - 1} does not exist; allowed: 0 to {experts - 1}")
            if (counts == 0).any():
                raise UsageError(f"layer {layer}: expert {int(np.argmax(counts == 0))} has no place")
            if not replicas and (counts > 1).any():
                raise UsageError(f"layer {layer}: expert {int(np.argmax(counts > 1))} has several places")


def contiguous(layers: int, experts: int, ranks: int) -> Placement:
    """Experts in the order of their ids, as evenly as they divide: what DeepSpeed and Megatron do."""
    return Placement.of([[part.tolist() for part in np.array_split(np.arange(experts), ranks)]] * layers)


def readers_of(kinds: Sequence[str], topology: Topology, on_node: Mapping[int, Sequence[str]]) -> Array:
    """[M, R]: which part of each kind of token each rank reads, from the kinds that nodes are set up to read. A kind
    that no node names is read by the nodes that name none or, if there are none, by all."""
    anywhere = [node for node in topology.nodes if not on_node.get(node)] or topology.nodes
    rows = []
    for kind in kinds:
        nodes = [node for node, named in on_node.items() if kind in named] or anywhere
        rows.append([float(node in nodes) for node in topology.nodes])
    readers = np.array(rows)
    return readers / readers.sum(axis=1, keepdims=True)
