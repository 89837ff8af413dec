"""A placement explained: per rank and per layer, in numbers and words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unimoe_ray.parallel.placement_cost import Flows, Work, flows, imbalance_of, layer_seconds
from unimoe_ray.parallel.topology import Array, Loads, Placement, Topology, contiguous

# A kind of token that makes up this part of an expert's tokens is named as the reason for its place.
MAIN_KIND = 0.5


@dataclass(frozen=True)
class Summary:
    """imbalance: slowest rank over mean, mean over layers; crossing: part of the routed tokens that leave their node;
    seconds of the expert layers in a step."""

    imbalance: float
    crossing: float
    seconds: float

    @classmethod
    def of(cls, found: Flows, topology: Topology, work: Work) -> Summary:
        total = found.load.sum()
        crossing = float(found.received.sum() / total) if total > 0 else 0.0
        return cls(float(imbalance_of(found).mean()), crossing, float(layer_seconds(found, topology, work).sum()))


def explain(placement: Placement, loads: Loads, topology: Topology, work: Work) -> list[str]:
    """Lines: the placement beside a contiguous one, a row for each rank, a row and reasons for each layer."""
    found = flows(placement, loads, topology)
    summaries = {"planned": Summary.of(found, topology, work)}
    plain = contiguous(loads.layers, loads.experts, topology.ranks)
    if all(len(held) <= slots for held, slots in zip(plain.layers[0], topology.slots, strict=True)):
        summaries["contiguous"] = Summary.of(flows(plain, loads, topology), topology, work)
    lines = [f"{'placement':<12} {'slowest/mean':>12} {'leave node':>10} {'seconds/step':>12}"]
    lines += [
        f"{name:<12} {s.imbalance:>12.3f} {s.crossing:>10.1%} {s.seconds:>12.3g}" for name, s in summaries.items()
    ]
    lines += ["", *_rank_rows(placement, found, topology), "", *_layer_rows(placement, loads, found, topology)]
    return lines


def _rank_rows(placement: Placement, found: Flows, topology: Topology) -> list[str]:
    """Loads are means over layers, in units of the mean rank's."""
    mean = np.maximum(found.load.mean(axis=1, keepdims=True), 1e-12)
    load, slowest = (found.load / mean).mean(axis=0), np.bincount(found.load.argmax(axis=1), minlength=topology.ranks)
    total = max(found.load.sum(), 1e-12)
    heads = (("rank", 4), ("node", 4), ("experts", 7), ("slots", 5), ("load", 6), ("slowest in", 10), ("sent", 8))
    lines = [" ".join(f"{name:>{width}}" for name, width in (*heads, ("received", 8)))]
    for rank, node in enumerate(topology.nodes):
        experts = np.mean([len(layer[rank]) for layer in placement.layers])
        lines.append(
            f"{rank:>4} {node:>4} {experts:>7.3g} {topology.slots[rank]:>5} {load[rank]:>6.3f} {slowest[rank]:>10} "
            f"{found.sent[:, rank].sum() / total:>8.1%} {found.received[:, rank].sum() / total:>8.1%}"
        )
    return lines


def _layer_rows(placement: Placement, loads: Loads, found: Flows, topology: Topology) -> list[str]:
    worst = imbalance_of(found)
    tokens = loads.tokens.sum(axis=1)
    lines = []
    for layer, ranks in enumerate(placement.layers):
        total = tokens[layer].sum()
        held = " | ".join(" ".join(map(str, experts)) or "-" for experts in ranks)
        lines.append(
            f"layer {layer}: slowest/mean {worst[layer]:.3f}: {held if len(held) <= 120 else held[:119] + '…'}"
        )
        if total <= 0:
            lines.append("  no tokens were seen: placed as if all experts had the same load")
            continue
        lines += [f"  {reason}" for reason in _reasons(layer, placement, loads, topology, tokens[layer] / total)]
    return lines


def _reasons(layer: int, placement: Placement, loads: Loads, topology: Topology, share: Array) -> list[str]:
    ranks_of: dict[int, list[int]] = {}
    for rank, experts in enumerate(placement.layers[layer]):
        for expert in experts:
            ranks_of.setdefault(expert, []).append(rank)
    reasons = []
    hottest = int(share.argmax())
    even, places = 1 / topology.ranks, ranks_of[hottest]
    if share[hottest] > even and len(places) == 1 and topology.ranks > 1:
        reasons.append(
            f"expert {hottest} alone gets {share[hottest]:.1%} of the tokens, more than a rank's even part "
            f"({even:.1%}): rank {places[0]} has the fewest others; only replicas would balance this layer better"
        )
    several = [expert for expert in sorted(ranks_of, key=lambda e: -share[e]) if len(ranks_of[expert]) > 1]
    for expert in several[:3]:
        reasons.append(
            f"expert {expert} ({share[expert]:.1%} of the tokens) is on ranks {', '.join(map(str, ranks_of[expert]))}, "
            f"each with a part of them"
        )
    if len(several) > 3:
        reasons.append(f"{len(several) - 3} more experts have several places")
    if len(loads.groups) > 1 and len(set(topology.nodes)) > 1:
        reasons += _near_their_readers(layer, loads, topology, share, ranks_of)
    return reasons


def _near_their_readers(
    layer: int, loads: Loads, topology: Topology, share: Array, ranks_of: dict[int, list[int]]
) -> list[str]:
    """Kinds of tokens with the experts that lie where most of them are read."""
    node_of = topology.node_of
    by_node = np.stack([loads.readers[:, node_of == node].sum(axis=1) for node in range(node_of.max() + 1)], axis=1)
    near: dict[tuple[str, int], list[int]] = {}
    for expert in np.flatnonzero(share > 0):
        parts = loads.tokens[layer, :, expert] / loads.tokens[layer, :, expert].sum()
        main = int(parts.argmax())
        best = by_node[main].max()
        if parts[main] >= MAIN_KIND and best > 1 / by_node.shape[1]:
            for node in {int(node_of[rank]) for rank in ranks_of[int(expert)]}:
                if by_node[main, node] == best:
                    near.setdefault((loads.groups[main], node), []).append(int(expert))
    return [
        f"experts {_few(experts)}: mostly {kind}, which node {topology.nodes[int(np.argmax(node_of == node))]} reads"
        for (kind, node), experts in sorted(near.items())
    ]


def _few(experts: list[int]) -> str:
    shown = ", ".join(map(str, experts[:8]))
    return shown if len(experts) <= 8 else f"{shown} and {len(experts) - 8} more"
