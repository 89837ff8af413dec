"""Where tokens go: by modality and layer, and each token's path through the experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from unimoe_ray.analysis.measures import common_paths, mutual_information, principal_plane, specialisation
from unimoe_ray.config.model import TOKEN_KINDS
from unimoe_ray.data.batch import collate
from unimoe_ray.data.samples import PreparedSample
from unimoe_ray.evaluation.answer import Lookup
from unimoe_ray.model.unimoe import Batch, UniMoE, to_batch, token_kinds

POINTS = 150  # of a kind in the picture of paths
COMMON = 10
_SEED = 0


def batches(prompts: list[PreparedSample], features: Lookup, batch_size: int) -> Iterator[Batch]:
    for start in range(0, len(prompts), batch_size):
        yield to_batch(collate(prompts[start : start + batch_size], features, with_labels=False))


@torch.no_grad()
def routing_of(model: UniMoE, prompts: list[PreparedSample], features: Lookup, batch_size: int) -> dict[str, Any]:
    """Routed slots of each kind of token by layer, and per layer how much the expert tells about the kind: in bits,
    and as a share of the most there can be."""
    routed = 0
    for batch in batches(prompts, features, batch_size):
        model.hidden_states(batch)
        routed = routed + model.recorder.sums().routed  # [L, G, E]
    kinds = [g for g, kind in enumerate(TOKEN_KINDS) if int(routed[:, g].sum())]
    return {
        "routed": {TOKEN_KINDS[g]: routed[:, g].tolist() for g in kinds},
        "bits": [round(mutual_information(layer), 4) for layer in routed],
        "score": [round(specialisation(layer), 4) for layer in routed],
    }


@torch.no_grad()
def paths_of(model: UniMoE, prompts: list[PreparedSample], features: Lookup, batch_size: int) -> dict[str, Any]:
    """A token's path: the weights of all experts in all layers. Some of each kind on the two directions in which paths
    differ most, and the paths (by first choices) that most of them take."""
    kinds, weights, first = [], [], []
    for batch in batches(prompts, features, batch_size):
        model.hidden_states(batch)
        layers = [stats.routing for stats in model.recorder.layers]
        kinds.append(token_kinds(batch.input_ids[batch.mask]))
        spread = [torch.zeros_like(r.logits).scatter(1, r.experts, r.weights.to(r.logits.dtype)) for r in layers]
        weights.append(torch.cat(spread, dim=1))  # [T, L*E]
        first.append(torch.stack([r.experts[:, 0] for r in layers], dim=1))
    kind, weight, choice = torch.cat(kinds), torch.cat(weights), torch.cat(first)
    # As many of each kind, so that one with many tokens does not decide what the picture shows.
    order = torch.randperm(len(kind), generator=torch.Generator().manual_seed(_SEED))
    chosen = torch.cat([order[kind[order] == g][:POINTS] for g in range(len(TOKEN_KINDS))])
    plane, explained = principal_plane(weight[chosen])
    names = [TOKEN_KINDS[g] for g in kind[chosen].tolist()]
    points: dict[str, list[list[float]]] = {}
    for name, point in zip(names, plane.tolist(), strict=True):
        points.setdefault(name, []).append([round(value, 4) for value in point])
    return {
        "points": points,
        "explained": [round(share, 4) for share in explained],
        "common": common_paths(choice[chosen], names, COMMON),
    }
