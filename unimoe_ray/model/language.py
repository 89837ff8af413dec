"""The language model: a Hugging Face LLaMA whose feed-forward layers can be mixtures (sparse upcycling)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from unimoe_ray.config.model import TOKEN_KINDS, LanguageConfig, MoEConfig
from unimoe_ray.errors import UsageError
from unimoe_ray.model.modality_losses import kl_losses, multimodal_losses
from unimoe_ray.model.moe import MoELayer
from unimoe_ray.model.pretrained import naming, read_config, read_pretrained
from unimoe_ray.model.routing import RoutingStats, RoutingSums, balance_loss, z_loss

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class RoutingRecorder:
    """Shared by the mixtures of one model: which tokens count, and the statistics of the last forward pass.

    token_mask [T] bool or None: tokens that are routed; padding passes through as zeros
    kinds [routed tokens] int64 or None: index of each token's kind in ``TOKEN_KINDS``
    owners [routed tokens] int64 or None: the sample of each token, below ``samples``
    group_sum: sums a tensor over the processes that share a step, for the losses of the routers; alone, the tensor
        itself
    """

    def __init__(self) -> None:
        self.token_mask: torch.Tensor | None = None
        self.kinds: torch.Tensor | None = None
        self.owners: torch.Tensor | None = None
        self.samples = 0
        self.layers: list[RoutingStats] = []
        self.group_sum: Callable[[torch.Tensor], torch.Tensor] | None = None

    def start(
        self,
        token_mask: torch.Tensor | None,
        kinds: torch.Tensor | None = None,
        owners: torch.Tensor | None = None,
        samples: int = 0,
    ) -> None:
        self.token_mask, self.kinds, self.owners, self.samples, self.layers = token_mask, kinds, owners, samples, []

    def sums(self) -> RoutingSums:
        """Statistics of the pass by layer and kind of token, fields [L, G, ...]. Needs a mixture."""
        return RoutingSums.stack([stats.sums for stats in self.layers])

    def loss(self, config: MoEConfig) -> torch.Tensor | float:
        """Weighted losses of the pass, over the tokens and samples of the whole group; 0 if all are off."""
        if not self.layers:
            return 0.0
        loss: torch.Tensor | float = 0.0
        if config.balance_coef or config.z_loss_coef:
            loss = loss + self._load_losses(config)
        if config.multimodal_loss_coef or config.kl_loss_coef:
            loss = loss + self._modality_losses(config)
        return loss

    def _load_losses(self, config: MoEConfig) -> torch.Tensor:
        sums = self.sums()
        if self.group_sum is not None:
            sums = sums.map(self.group_sum)
        balance = balance_loss(sums, config.balance_share, config.balance_per)
        balance = balance.mean() if config.balance_over_layers == "mean" else balance.sum()
        return config.balance_coef * balance + config.z_loss_coef * z_loss(sums).mean()

    def _modality_losses(self, config: MoEConfig) -> torch.Tensor:
        """Means over the samples of the group; over layers as the balance loss."""
        layers = []
        for stats in self.layers:
            about = stats.routing.logits, self.kinds, self.owners, self.samples
            loss = config.kl_loss_coef * kl_losses(*about) if config.kl_loss_coef else 0.0
            if config.multimodal_loss_coef:
                loss = loss + config.multimodal_loss_coef * multimodal_losses(*about, config.experts_by_modality())
            layers.append(loss.sum())
        total = torch.stack(layers)
        total = total.mean() if config.balance_over_layers == "mean" else total.sum()
        samples = (torch.bincount(self.owners, minlength=self.samples) > 0).sum().to(total.dtype)
        if self.group_sum is not None:
            # This process's part of a mean over all samples: the parts are added up, as gradients are.
            samples = self.group_sum(samples)
        return total / samples.clamp(min=1)


class SparseFeedForward(MoELayer):
    """A ``MoELayer`` in the place of a decoder layer's MLP; its statistics go to the recorder."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, num_experts: int, top_k: int, recorder: RoutingRecorder
    ):
        super().__init__(hidden_size, intermediate_size, num_experts, top_k)
        self.recorder = recorder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask, kinds = self.recorder.token_mask, self.recorder.kinds
        index = None if mask is None else mask.nonzero().squeeze(-1)
        if index is None or len(index) == len(mask):
            y, stats = super().forward(x, kinds, len(TOKEN_KINDS))
        else:
            tokens = x.reshape(-1, x.shape[-1])
            routed, stats = super().forward(tokens.index_select(0, index), kinds, len(TOKEN_KINDS))
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


def pretrained_config(config: LanguageConfig) -> LlamaConfig:
    """Of the pretrained LLaMA that the configuration names. Raises UnimoeError when there is none that can be read,
    UsageError when sequences of ``max_positions`` are longer than it was made for."""
    with naming("model.language.pretrained", config.pretrained, "LLaMA"):
        found = read_config(LlamaConfig, config.pretrained)
    if config.max_positions > found.max_position_embeddings:
        raise UsageError(
            f"model.language.max_positions is {config.max_positions}; {config.pretrained} takes at most "
            f"{found.max_position_embeddings}"
        )
    return found


def build_llama(config: LanguageConfig, vocab_size: int) -> LlamaForCausalLM:
    """A randomly initialised LLaMA of these sizes, or the pretrained one that the configuration names, in fp32. Raises
    as ``pretrained_config``."""
    if config.pretrained is None:
        return LlamaForCausalLM(llama_config(config, vocab_size))
    pretrained_config(config)
    with naming("model.language.pretrained", config.pretrained, "LLaMA"):
        return read_pretrained(LlamaForCausalLM, LlamaConfig, config.pretrained)


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
