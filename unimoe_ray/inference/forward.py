"""One pass of the language model over the new tokens of many sequences, laid end to end without padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from unimoe_ray.inference.kv_cache import KVArena
from unimoe_ray.model.unimoe import UniMoE


@dataclass(frozen=True)
class Span:
    """New tokens of one sequence: ``count`` rows of the batch, after ``cached`` tokens that are in the cache, which
    begins at ``start`` of the arena."""

    start: int
    cached: int
    count: int


class Decoder(Protocol):
    """The layers of a model, with the arena that they keep keys and values in."""

    def __call__(
        self, embeddings: torch.Tensor, spans: list[Span], ready: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the input embeddings [T, H] of all spans, whose keys and values go to the arena: logits [n, V] fp32 of the
        rows ``ready``, and the experts of each token [L, T, K] int64 on the CPU (L mixtures, possibly 0), best first.

        Each span sees its own sequence and nothing else, so a sequence has the same logits (to rounding) in any
        company.
        """


class TorchDecoder:
    """The model's own layers, on any device; only attention differs, in where it reads keys and values."""

    def __init__(self, model: UniMoE, arena: KVArena):
        self.model, self.arena = model, arena

    @torch.inference_mode()
    def __call__(
        self, embeddings: torch.Tensor, spans: list[Span], ready: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        model, decoder = self.model, self.model.language.get_decoder()
        model.recorder.start(None)
        positions = torch.cat([torch.arange(span.cached, span.cached + span.count) for span in spans])
        places = torch.cat(
            [torch.arange(span.start + span.cached, span.start + span.cached + span.count) for span in spans]
        )
        positions, places = positions.to(embeddings.device), places.to(embeddings.device)
        rotary = decoder.rotary_emb(embeddings, positions[None])
        hidden = embeddings
        for layer, keys, values in zip(decoder.layers, self.arena.keys, self.arena.values, strict=True):
            hidden = hidden + _attend(
                layer.self_attn, layer.input_layernorm(hidden), rotary, (keys, values), places, spans
            )
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        chosen = [stats.experts for stats in model.recorder.layers]
        logits = model.language.get_output_embeddings()(decoder.norm(hidden[ready])).float()
        return logits, torch.stack(chosen).cpu() if chosen else torch.empty(0, len(embeddings), 1, dtype=torch.int64)


def _attend(
    attention: LlamaAttention,
    x: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    cache: tuple[torch.Tensor, torch.Tensor],
    places: torch.Tensor,
    spans: list[Span],
) -> torch.Tensor:
    keys, values = cache
    shape = (len(x), -1, attention.head_dim)
    query, key = attention.q_proj(x).view(shape), attention.k_proj(x).view(shape)
    query, key = apply_rotary_pos_emb(query[None], key[None], *rotary, unsqueeze_dim=2)
    keys.index_copy_(0, places, key[0].to(keys.dtype))
    values.index_copy_(0, places, attention.v_proj(x).view(shape).to(values.dtype))
    rows = query[0].split([span.count for span in spans])
    mixed = [
        _attend_span(row, *(c[span.start : span.start + span.cached + span.count] for c in cache), attention.scaling)
        for row, span in zip(rows, spans, strict=True)
    ]
    return attention.o_proj(torch.cat(mixed).flatten(1))


def _attend_span(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """query [n, heads, D], the last n of the sequence, over keys and values [seen, kv heads, D]: [n, heads, D]."""
    n, seen = len(query), len(keys)
    mask = None
    if 1 < n < seen:
        mask = torch.ones(n, seen, dtype=torch.bool, device=query.device).tril(seen - n)
    mixed = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=1 < n == seen,
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return mixed[0].transpose(0, 1)
