"""Soft tokens into the text sequence."""

from __future__ import annotations

import torch

from unimoe_ray.config.model import PLACEHOLDER_IDS
from unimoe_ray.model.features import Features


def splice(embeddings: torch.Tensor, input_ids: torch.Tensor, soft_tokens: dict[str, Features]) -> torch.Tensor:
    """Write soft tokens over the placeholders of ``input_ids``.

    embeddings  [B, S, H] of the text (anything at placeholders)
    input_ids   [B, S] with one placeholder id per soft token, files in order, rows in order
    soft_tokens per modality: [files, M, H] with lengths, files in the order of their placeholders
    Returns [B, S, H]. Raises ValueError when placeholders and soft tokens of a modality differ in number.
    """
    flat = embeddings.reshape(-1, embeddings.shape[-1])
    ids = input_ids.reshape(-1)
    for modality, soft in soft_tokens.items():
        where = (ids == PLACEHOLDER_IDS[modality]).nonzero().squeeze(-1)
        valid = torch.arange(soft.values.shape[1], device=soft.lengths.device) < soft.lengths[:, None]
        tokens = soft.values[valid]
        if len(where) != len(tokens):
            raise ValueError(f"{modality}: {len(where)} placeholders for {len(tokens)} soft tokens")
        flat = flat.index_copy(0, where, tokens.to(flat.dtype))
    return flat.view_as(embeddings)
