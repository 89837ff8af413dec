"""The language model as a stock ``MixtralForCausalLM``, when every layer is a mixture.

Mixtral (arXiv 2401.04088) takes softmax over all experts and renormalises the k largest values. That is softmax over
the k selected logits, which is what Uni-MoE computes: the sum over all experts cancels. Its projections ``w1``, ``w3``
and ``w2`` are LLaMA's gate, up and down. The files have the names of the published Mixtral checkpoints, which
transformers (it fuses experts when loading) and other engines read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, MixtralConfig

from unimoe_ray.errors import UnimoeError
from unimoe_ray.interop.shards import MAX_SHARD_BYTES, write_shards
from unimoe_ray.model.language import mixtures

_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.")
_PROJECTIONS = {"gate": "w1", "up": "w3", "down": "w2"}


def write_mixtral(language: LlamaForCausalLM, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """``config.json`` and weights into an existing folder. Raises UnimoeError for a model that no Mixtral equals."""
    mixtral_config(language).save_pretrained(folder)
    write_shards(folder, _tensors(language), max_shard_bytes)


def mixtral_config(language: LlamaForCausalLM) -> MixtralConfig:
    """Raises UnimoeError for a model that no Mixtral equals."""
    llama, layers = language.config, mixtures(language)
    dense = llama.num_hidden_layers - len(layers)
    if dense:
        raise UnimoeError(f"{dense} of {llama.num_hidden_layers} layers are dense; every layer of a Mixtral is sparse")
    if llama.attention_bias or llama.mlp_bias:
        raise UnimoeError("the language model has biases, which a Mixtral has not")
    config = MixtralConfig(
        vocab_size=llama.vocab_size,
        hidden_size=llama.hidden_size,
        intermediate_size=llama.intermediate_size,
        num_hidden_layers=llama.num_hidden_layers,
        num_attention_heads=llama.num_attention_heads,
        num_key_value_heads=llama.num_key_value_heads,
        head_dim=llama.head_dim,
        hidden_act=llama.hidden_act,
        max_position_embeddings=llama.max_position_embeddings,
        rms_norm_eps=llama.rms_norm_eps,
        rope_parameters=llama.rope_parameters,
        tie_word_embeddings=llama.tie_word_embeddings,
        bos_token_id=llama.bos_token_id,
        eos_token_id=llama.eos_token_id,
        pad_token_id=llama.pad_token_id,
        num_local_experts=layers[0].num_experts,
        num_experts_per_tok=layers[0].top_k,
        dtype=language.dtype,
    )
    config.architectures = ["MixtralForCausalLM"]
    return config


def _tensors(language: LlamaForCausalLM) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in language.state_dict().items():
        if name == "lm_head.weight" and language.config.tie_word_embeddings:
            continue
        name = _EXPERT.sub(
            lambda match: f".block_sparse_moe.experts.{match[1]}.{_PROJECTIONS[match[2]]}.",
            name,
        )
        yield name.replace(".mlp.gate.", ".block_sparse_moe.gate."), tensor
