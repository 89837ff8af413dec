"""Losses that send modalities to different experts: what only the official 8-expert code has, off in its released
configuration (``interop.official_8e`` has it as reference functions).

Here they are of tokens without padding, so a modality's share is of its sample's own length, and means over samples, so
neither batch size nor padding changes them; there they are of padded rows and sums. Sounds and speech are two kinds of
token here; there, where a model has one of them, both are audio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from unimoe_ray.config.model import TOKEN_KINDS

# Kinds that are pushed apart. As there, pictures and videos are not, and so neither are sounds and speech.
_PAIRS = (
    ("image", "audio"),
    ("image", "speech"),
    ("image", "text"),
    ("audio", "text"),
    ("speech", "text"),
    ("audio", "video"),
    ("speech", "video"),
    ("video", "text"),
)
PAIRS = tuple((TOKEN_KINDS.index(a), TOKEN_KINDS.index(b)) for a, b in _PAIRS)


def multimodal_losses(
    logits: torch.Tensor, kinds: torch.Tensor, owners: torch.Tensor, samples: int, experts: Mapping[str, Sequence[int]]
) -> torch.Tensor:
    """How far the router's probabilities are from 1 at a modality's own experts and 0 at others: the mean absolute
    difference, weighted by the modality's share of its sample, summed over modalities. [samples].

    logits [T, E]; kinds [T] int64: index in ``TOKEN_KINDS``; owners [T] int64: the sample of each token; experts: of
    each modality that has some; other kinds of token don't count
    """
    count = logits.shape[-1]
    targets = logits.new_zeros(len(TOKEN_KINDS), count)
    counted = logits.new_zeros(len(TOKEN_KINDS))
    for kind, own in experts.items():
        targets[TOKEN_KINDS.index(kind), list(own)] = 1.0
        counted[TOKEN_KINDS.index(kind)] = 1.0
    distance = (logits.softmax(-1) - targets[kinds]).abs().mean(-1) * counted[kinds]
    length = torch.bincount(owners, minlength=samples).clamp(min=1)
    return logits.new_zeros(samples).index_add(0, owners, distance) / length


def kl_losses(logits: torch.Tensor, kinds: torch.Tensor, owners: torch.Tensor, samples: int) -> torch.Tensor:
    """1 - KL(b || a) / E of the mean probabilities of two kinds of token (passed through softmax again, as there),
    averaged over the pairs (a, b) that a sample has; 0 for a sample that has none. [samples]. Arguments as above."""
    groups, count = len(TOKEN_KINDS), logits.shape[-1]
    place = owners * groups + kinds
    tokens = torch.bincount(place, minlength=samples * groups)
    sums = logits.new_zeros(samples * groups, count).index_add(0, place, logits.softmax(-1))
    log_mean = (sums / tokens.clamp(min=1).unsqueeze(-1)).log_softmax(-1).view(samples, groups, count)
    a, b = (torch.tensor(side, device=logits.device) for side in zip(*PAIRS, strict=True))
    divergence = (log_mean[:, b].exp() * (log_mean[:, b] - log_mean[:, a])).sum(-1) / count
    present = (tokens > 0).view(samples, groups)
    pairs = (present[:, a] & present[:, b]).to(logits.dtype)
    return ((1 - divergence) * pairs).sum(-1) / pairs.sum(-1).clamp(min=1)
