"""The mixture layer, the language model with mixtures and the splice against the official ones."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from tests.golden.case import Case, Tensors
from unimoe_ray.config.model import LanguageConfig
from unimoe_ray.interop.official.names import why_ignored
from unimoe_ray.model.language import RoutingRecorder, build_llama, upcycle
from unimoe_ray.model.moe import MoELayer


def without_buffers(weights: Tensors) -> Tensors:
    """Official state dicts hold constants that nobody needs."""
    return {name: tensor for name, tensor in weights.items() if not why_ignored(name)}


@torch.no_grad()
def moe_layer_4e_top2(case: Case) -> None:
    config = case.config
    experts, top_k = config["num_experts"], config["num_experts_per_tok"]

    def run(k: int, x: torch.Tensor):
        layer = MoELayer(config["hidden_size"], config["intermediate_size"], experts, k)
        layer.load_state_dict(case.weights())
        return layer(x)

    x = case.inputs["hidden_states"]
    output, stats = run(top_k, x)
    case.check("output", output)
    case.check("topk_experts", stats.experts)
    logits = F.linear(x, case.weights()["gate.weight"]).flatten(0, -2)
    case.check("gate_logits", logits)
    weights = logits.gather(-1, stats.experts).softmax(-1)
    case.check("topk_weights", weights)
    case.check("dense_gates", torch.zeros_like(logits).scatter(-1, stats.experts, weights))
    case.check("output_single_token", run(top_k, case.inputs["hidden_states_single"])[0])
    for name in case.outputs:
        if name.startswith("output_top"):  # output_top1, output_top4_all
            k = int(name.removeprefix("output_top").removesuffix("_all"))
            case.check(name, run(k, x)[0])


def language_config(case: Case) -> LanguageConfig:
    config = case.config
    return LanguageConfig(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        max_positions=config["max_position_embeddings"],
        rms_norm_eps=config["rms_norm_eps"],
        rope_theta=config.get("rope_theta", 10_000.0),
        tie_embeddings=config.get("tie_word_embeddings", False),
    )


def watch_routers(llama: LlamaForCausalLM, layers: list[int]) -> Tensors:
    """Filled at each forward pass with the router logits of each mixture, by the name of a case's output."""
    logits: Tensors = {}
    for index in layers:
        mixture = llama.model.layers[index].mlp

        def keep(module, inputs, name=f"gate_logits_layer{index}"):
            logits[name] = F.linear(inputs[0], module.gate.weight).flatten(0, -2)

        mixture.register_forward_pre_hook(keep)
    return logits


@torch.no_grad()
def llama_moe(case: Case) -> None:
    config = case.config
    llama = build_llama(language_config(case), config["vocab_size"]).eval()
    upcycle(llama, case.spec["moe_layers"], config["num_experts"], config["num_experts_per_tok"], RoutingRecorder())
    llama.load_state_dict(without_buffers(case.weights()))
    routers = watch_routers(llama, case.spec["moe_layers"])
    ids, mask, labels = (case.inputs[name] for name in ("input_ids", "attention_mask", "labels"))
    output = llama(ids, attention_mask=mask.long(), labels=labels, output_hidden_states=True)
    case.check("logits", output.logits, where=mask)
    case.check("loss", output.loss[None])
    for number, hidden in enumerate(output.hidden_states):
        case.check(f"hidden_{number}", hidden, where=mask)
    for name, logits in routers.items():
        case.check(name, logits, where=mask.flatten())
    case.check("logits_row0_no_mask", llama(ids[:1]).logits)

    wanted = case.outputs["greedy_ids"]
    steps = case.outputs["greedy_step_logits_cached"].shape[1]
    prompt = wanted[:, :-steps]
    found = llama.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=-1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    case.check("greedy_ids", found.sequences)
    case.check("greedy_step_logits_cached", torch.stack(found.logits, dim=1))
