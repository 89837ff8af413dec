"""The reference functions for the official 8-expert code."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tests.golden.case import Case
from unimoe_ray.interop.official_8e import balance_loss, kl_loss, moe_layer, multimodal_loss, top2_gate


def gate_8e_top2_aux(case: Case) -> None:
    logits, noise = case.inputs["logits"], case.inputs["gumbel_noise"]
    for name in case.config["cases"]:
        if name == "plain_layer":
            case.check(f"{name}.l_aux", balance_loss(logits)[None])
        elif name == "balanced":  # its logits are not stored: any that prefer each expert once, and equally
            case.check(f"{name}.l_aux", balance_loss(0.01 * torch.eye(case.config["num_experts"]))[None])
        else:
            _, _, factor = name.partition("drop_cap")
            gating = top2_gate(logits, noise if name.endswith("_gumbel") else None, float(factor) if factor else None)
            case.check(f"{name}.l_aux", gating.balance_loss[None])
            case.check(f"{name}.dense_weights", gating.weights)
            case.check(f"{name}.exp_counts", gating.counts)
            case.check(f"{name}.capacity", torch.tensor([gating.capacity]))


def moe_layer_8e_lora(case: Case) -> None:
    x, scaling = case.inputs["hidden_states"], case.config["scaling"]
    for prefix, noise in (("", None), ("gumbel.", case.inputs["gumbel_noise"])):
        output, gating = moe_layer(x, case.weights(), scaling, noise)
        case.check(f"{prefix}output", output)
        case.check(f"{prefix}l_aux", gating.balance_loss[None])
        case.check(f"{prefix}{'returned_logits' if prefix else 'gate_logits'}", gating.logits)
        if not prefix:
            case.check("exp_counts", gating.counts)


def losses_8e(case: Case) -> None:
    config, ranges = case.config, case.spec["token_ranges"]
    size = (config["batch"], config["length"], config["experts"])
    names = sorted((name for name in case.inputs if name.startswith("gate_logits_layer")), key=lambda n: int(n[17:]))
    layers = [case.inputs[name] for name in names]
    experts = {kind: config[f"{kind}_expert_indices"] for kind in ("image", "video", "audio")}
    logits = F.linear(case.inputs["hidden_states"], case.weights()["lm_head.weight"])
    ce = F.cross_entropy(logits[:, :-1].flatten(0, 1), case.inputs["labels"][:, 1:].flatten())
    balance = torch.stack([balance_loss(layer) for layer in layers])
    extra = {
        "balance": balance.sum(),
        "multimodal": sum(multimodal_loss(layer.view(size), ranges, experts) for layer in layers),
        "kl": sum(kl_loss(layer.view(size), ranges) for layer in layers),
    }
    case.check("l_aux_per_layer", balance)
    case.check("loss_ce", ce[None])
    for name, loss in extra.items():
        case.check(f"loss_ce_{name}", (ce + config["coef"] * loss)[None])
    case.check("loss_all", (ce + config["coef"] * sum(extra.values()))[None])
