"""Figures of soft tokens and of routing, as functions of tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

CHUNK = 1024  # tokens compared with the vocabulary at a time


def token_statistics(tokens: torch.Tensor) -> dict[str, float]:
    """Of tokens [T, H], T at least 1:

    norm       mean length
    norm_sd    standard deviation of the lengths
    spread     root mean square distance from their mean, over the root mean square length: 0 if all are one vector,
               1 if their mean is 0
    alike      mean cosine of two different tokens; nan of a single one
    """
    tokens = tokens.float()
    norms = tokens.norm(dim=-1)
    centred = (tokens - tokens.mean(dim=0)).square().sum(dim=-1).mean().sqrt()
    count = len(tokens)
    total = F.normalize(tokens, dim=-1).sum(dim=0).square().sum()  # over all pairs, each with itself included
    return {
        "norm": float(norms.mean()),
        "norm_sd": float(norms.std(correction=0)),
        "spread": float(centred / norms.square().mean().sqrt().clamp(min=1e-12)),
        "alike": float((total - count) / (count * (count - 1))) if count > 1 else math.nan,
    }


def nearest_words(
    tokens: torch.Tensor, vocabulary: torch.Tensor, words: Sequence[str], most: int
) -> tuple[float, list[tuple[str, float]]]:
    """The mean over tokens [T, H] of the cosine with the nearest row of ``vocabulary`` [V, H], and the ``most`` words
    that are nearest to the most tokens, each with its share of the tokens."""
    table = F.normalize(vocabulary.float(), dim=-1)
    found: Counter[int] = Counter()
    total = 0.0
    for part in tokens.float().split(CHUNK):
        cosine, index = (F.normalize(part, dim=-1) @ table.T).max(dim=-1)
        total += float(cosine.sum())
        found.update(index.tolist())
    shares = [(words[index], count / len(tokens)) for index, count in found.most_common(most)]
    return total / len(tokens), shares


def mutual_information(counts: torch.Tensor) -> float:
    """In bits, between the kind of a token and its expert: counts [G, E] of routed slots. Every kind that has tokens
    weighs the same, however many they are."""
    counts = counts.double()
    counts = counts[counts.sum(dim=1) > 0]
    if not len(counts):
        return 0.0
    joint = counts / counts.sum(dim=1, keepdim=True) / len(counts)
    independent = joint.sum(dim=1, keepdim=True) * joint.sum(dim=0, keepdim=True)
    terms = torch.where(joint > 0, joint * (joint / independent.clamp(min=1e-300)).log2(), 0.0)
    return max(0.0, float(terms.sum()))


def specialisation(counts: torch.Tensor) -> float:
    """``mutual_information`` as a share of the most that so many kinds and experts allow: 0 when every kind goes to all
    experts alike, 1 when each keeps to experts of its own."""
    kinds = int((counts.sum(dim=1) > 0).sum())
    most = math.log2(min(kinds, counts.shape[1])) if min(kinds, counts.shape[1]) > 1 else 0.0
    return mutual_information(counts) / most if most else 0.0


def principal_plane(points: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """Points [T, D] on their first two principal components [T, 2], and the share of the variance along each. The
    largest loading of a component is positive, so that the same points give the same picture."""
    centred = points.double() - points.double().mean(dim=0)
    _, lengths, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = F.pad(axes, (0, 0, 0, max(0, 2 - len(axes))))[:2]
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    axes = axes * torch.where(largest < 0, -1.0, 1.0)
    variance = F.pad(lengths.square(), (0, max(0, 2 - len(lengths))))
    shares = (variance[:2] / variance.sum().clamp(min=1e-300)).tolist()
    return centred @ axes.T, shares


def common_paths(first: torch.Tensor, kinds: Sequence[str], most: int) -> list[dict[str, Any]]:
    """The ``most`` frequent sequences of first choices: first [T, L] experts of the tokens, ``kinds`` their kinds. Each
    with its share of the tokens of every kind."""
    paths = list(map(tuple, first.tolist()))
    of_kind = {kind: [path for path, k in zip(paths, kinds, strict=True) if k == kind] for kind in dict.fromkeys(kinds)}
    found = Counter(paths).most_common(most)
    return [
        {"path": list(path), "shares": {kind: of.count(path) / len(of) for kind, of in of_kind.items()}}
        for path, _ in found
    ]
