"""The language model: a Hugging Face LLaMA whose feed-forward layers can be mixtures (sparse upcycling)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from unimoe_ray.config.model import LanguageConfig
from unimoe_ray.model.moe import MoELayer, RoutingStats

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class RoutingRecorder:
    """Shared by the mixtures of one model: which tokens count, and the statistics of the last forward pass.

    token_mask [T] bool or None: tokens that are routed; padding passes through as zeros
    """

    def __init__(self) -> None:
        self.token_mask: torch.Tensor | None = None
        self.layers: list[RoutingStats] = []

    def start(self, token_mask: torch.Tensor | None) -> None:
        self.token_mask, self.layers = token_mask, []

    def balance_loss(self, over_layers: str) -> torch.Tensor | float:
        if not self.layers:
            return 0.0
        losses = torch.stack([stats.balance_loss for stats in self.layers])
        return losses.mean() if over_layers == "mean" else losses.sum()


class SparseFeedForward(MoELayer):
    """A ``MoELayer`` in the place of a decoder layer's MLP; its statistics go to the recorder."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, num_experts: int, top_k: int, recorder: RoutingRecorder
    ):
        super().__init__(hidden_size, intermediate_size, num_experts, top_k)
        self.recorder = recorder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = self.recorder.token_mask
        if mask is None:
            y, stats = super().forward(x)
        else:
            tokens = x.reshape(-1, x.shape[-1])
            index = mask.nonzero().squeeze(-1)
            routed, stats = super().forward(tokens[index])
            y = torch.zeros_like(tokens).index_copy(0, index, routed.to(tokens.dtype)).view_as(x)
        self.recorder.layers.append(stats)
        return y


def llama_config(config: LanguageConfig, vocab_size: int) -> LlamaConfig:
    """Of the sizes that the configuration states."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_embeddings,
        attn_implementation="sdpa",
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def build_llama(config: LanguageConfig, vocab_size: int) -> LlamaForCausalLM:
    """A randomly initialised LLaMA of these sizes, or the pretrained one that the configuration names."""
    if config.pretrained is not None:
        return LlamaForCausalLM.from_pretrained(config.pretrained, attn_implementation="sdpa", dtype=torch.float32)
    return LlamaForCausalLM(llama_config(config, vocab_size))


def upcycle(
    llama: LlamaForCausalLM, layers: Iterable[int], num_experts: int, top_k: int, recorder: RoutingRecorder
) -> None:
    """Turn the MLPs of ``layers`` into mixtures of copies of themselves (sparse upcycling, arXiv 2212.05055).

    Until the experts differ, the result computes what the dense model does.
    """
    for index in layers:
        dense = llama.model.layers[index].mlp
        sparse = SparseFeedForward(
            llama.config.hidden_size, llama.config.intermediate_size, num_experts, top_k, recorder
        )
        sparse.to(dense.gate_proj.weight.device, dense.gate_proj.weight.dtype)
        for expert in sparse.experts:
            expert.load_state_dict(dense.state_dict())
        llama.model.layers[index].mlp = sparse


def place_expert(llama: LlamaForCausalLM, slot: int, feed_forward: dict[str, torch.Tensor]) -> None:
    """Fill one expert slot of every mixture from a dense model's ``model.layers.L.mlp.*_proj.weight`` tensors."""
    for index, layer in enumerate(llama.model.layers):
        if isinstance(layer.mlp, SparseFeedForward):
            prefix = f"model.layers.{index}.mlp."
            state = {f"{name}.weight": feed_forward[f"{prefix}{name}.weight"] for name in PROJECTIONS}
            layer.mlp.experts[slot].load_state_dict(state)


def mixtures(model: nn.Module) -> list[SparseFeedForward]:
    """The mixture layers of a model, first layer first."""
    return [module for module in model.modules() if isinstance(module, SparseFeedForward)]
