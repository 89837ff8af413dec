"""A LLaMA whose feed-forward layers are mixtures, all or some, for vLLM 0.32: its attention and its fused experts.

Weights keep our names. ``config.json``: that of the LLaMA, with ``moe_layers``, the indices of the mixtures,
``num_local_experts`` and ``num_experts_per_tok``.
"""

from __future__ import annotations

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import WeightsMapper, extract_layer_index

# The experts' own gate_proj and up_proj are not to be stacked: hence ".mlp." before them.
MAPPER = WeightsMapper(
    orig_to_new_stacked={
        ".q_proj": (".qkv_proj", "q"),
        ".k_proj": (".qkv_proj", "k"),
        ".v_proj": (".qkv_proj", "v"),
        ".mlp.gate_proj": (".mlp.gate_up_proj", 0),
        ".mlp.up_proj": (".mlp.gate_up_proj", 1),
    }
)


class Mixture(nn.Module):
    """Softmax over the top-k logits, which is what renormalising the k largest probabilities gives.

    routed [E]: slots of all tokens so far
    """

    def __init__(self, config, quant_config=None, prefix: str = ""):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = GateLinear(config.hidden_size, config.num_local_experts, prefix=f"{prefix}.gate")
        self.experts = FusedMoEFactory(
            num_experts=config.num_local_experts,
            top_k=self.top_k,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            renormalize=True,
            quant_config=quant_config,
            prefix=f"{prefix}.experts",
            ckpt_names=("gate_proj", "down_proj", "up_proj"),
        )
        self.routed = torch.zeros(config.num_local_experts, dtype=torch.int64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits, _ = self.gate(x)
        chosen = logits.topk(self.top_k, dim=-1).indices.flatten()
        self.routed = self.routed.to(x.device) + torch.bincount(chosen, minlength=len(self.routed))
        return self.experts(x, logits)


class DecoderLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config, prefix: str = "", config=None, **rest):
        super().__init__(vllm_config, prefix=prefix, config=config, **rest)
        config = config or vllm_config.model_config.hf_config
        if extract_layer_index(prefix) in config.moe_layers:
            self.mlp = Mixture(config, vllm_config.quant_config, prefix=f"{prefix}.mlp")


class Decoder(LlamaModel):
    hf_to_vllm_mapper = MAPPER


class UniMoELlamaForCausalLM(LlamaForCausalLM):
    hf_to_vllm_mapper = MAPPER

    def __init__(self, *, vllm_config, prefix: str = "", layer_type=DecoderLayer):
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)

    def _init_model(self, vllm_config, prefix: str = "", layer_type=DecoderLayer):
        return Decoder(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
