"""Greedy answers to prepared prompts, batched, and what the routers do on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tokenizers import Tokenizer

from unimoe_ray.config.model import TOKEN_KINDS
from unimoe_ray.data.batch import collate
from unimoe_ray.data.prompt import decode
from unimoe_ray.data.samples import PreparedSample
from unimoe_ray.data.store import StoredFeatures
from unimoe_ray.data.tokenizer import end_token
from unimoe_ray.model.language import mixtures
from unimoe_ray.model.unimoe import UniMoE, to_batch

Lookup = Callable[[str], StoredFeatures]


def answer(
    model: UniMoE,
    tokenizer: Tokenizer,
    prompts: list[PreparedSample],
    features: Lookup,
    *,
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """Autoregressive greedy answers, in the order of ``prompts``; batches are made of prompts of similar length."""
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].length)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        arrays = collate([prompts[i] for i in rows], features, pad_left=True, with_labels=False)
        tokens = model.generate(to_batch(arrays), max_new_tokens, end_token(tokenizer))
        for row, ids in zip(rows, tokens.tolist(), strict=True):
            answers[row] = decode(ids, tokenizer)
    return answers


@torch.no_grad()
def expert_load(
    model: UniMoE, prompts: list[PreparedSample], features: Lookup, *, batch_size: int
) -> dict[str, torch.Tensor]:
    """Routed slots per modality: {modality: [layers, E] int64}, padding excluded. Empty for a dense model."""
    layers = mixtures(model)
    if not layers:
        return {}
    routed = torch.zeros(len(layers), len(TOKEN_KINDS), layers[0].num_experts, dtype=torch.int64)
    for start in range(0, len(prompts), batch_size):
        model(to_batch(collate(prompts[start : start + batch_size], features, with_labels=False)))
        routed += model.recorder.sums().routed
    return dict(zip(TOKEN_KINDS, routed.unbind(1), strict=True))
