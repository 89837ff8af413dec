"""Choosing the next tokens of a batch, each row by its own parameters."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from unimoe_ray.inference.request import SamplingParams

GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class Row:
    """One sequence's part in sampling. ``generated``: its tokens so far; ``seed``: drawn already if none was given."""

    params: SamplingParams
    generated: list[int]
    seed: int


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """Of each row [n, V], [n] int64; a NaN is above all. NumPy's search is many times faster than torch's on CPUs."""
    if logits.device.type == "cpu" and logits.dtype is torch.float32:
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def sample(logits: torch.Tensor, rows: list[Row]) -> torch.Tensor:
    """Next token of each row: [n] int64 from ``logits`` [n, V] float.

    Order, as OpenAI and vLLM have it: penalties, temperature, top-k, top-p. The random number of a row depends on its
    seed and its place in the answer alone, so a seeded request gives the same text in any company, and goes on with
    the same text elsewhere.
    """
    logits = _penalised(logits.float(), rows)
    tokens = likeliest(logits)
    drawn = [i for i, row in enumerate(rows) if row.params.temperature >= GREEDY_BELOW]
    if drawn:
        tokens[drawn] = _draw(logits[drawn], [rows[i] for i in drawn])
    return tokens


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from a seed and a position, without state."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) * 2.0**-53


def top_logprobs(logits: torch.Tensor, tokens: torch.Tensor, k: int) -> list[tuple[float, list[tuple[int, float]]]]:
    """Per row: log probability of its token, and the ``k`` likeliest (token, log probability), before any penalty or
    temperature."""
    log_probabilities = logits.float().log_softmax(dim=-1)
    chosen = log_probabilities.gather(1, tokens[:, None])[:, 0].tolist()
    values, ids = log_probabilities.topk(min(k, logits.shape[-1]), dim=-1)
    alternatives = [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return list(zip(chosen, alternatives, strict=True))


def _penalised(logits: torch.Tensor, rows: list[Row]) -> torch.Tensor:
    some = [(i, r) for i, r in enumerate(rows) if r.params.frequency_penalty or r.params.presence_penalty]
    if some:
        logits = logits.clone()
    for index, row in some:
        seen, counts = torch.tensor(row.generated, dtype=torch.int64, device=logits.device).unique(return_counts=True)
        logits[index, seen] -= row.params.frequency_penalty * counts + row.params.presence_penalty
    return logits


def _draw(logits: torch.Tensor, rows: list[Row]) -> torch.Tensor:
    """Inverse of the cumulative distribution over the kept tokens, likeliest first."""
    temperature = logits.new_tensor([row.params.temperature for row in rows])[:, None]
    values, order = (logits / temperature).sort(dim=-1, descending=True, stable=True)
    vocabulary = logits.shape[-1]
    top_k = torch.tensor([row.params.top_k or vocabulary for row in rows], device=logits.device)[:, None]
    values = values.masked_fill(torch.arange(vocabulary, device=logits.device) >= top_k, float("-inf"))
    cumulative = values.softmax(dim=-1).double().cumsum(dim=-1)
    top_p = cumulative.new_tensor([row.params.top_p for row in rows])[:, None]
    # The first token past the nucleus completes it, so the likeliest one is always kept.
    kept = (cumulative < top_p).sum(dim=-1, keepdim=True).clamp(max=vocabulary - 1)
    u = cumulative.new_tensor([uniform(row.seed, len(row.generated)) for row in rows])[:, None]
    place = torch.searchsorted(cumulative, u * cumulative.gather(1, kept), right=True)
    place = torch.minimum(place, torch.minimum(kept, top_k - 1))
    return order.gather(1, place)[:, 0]
