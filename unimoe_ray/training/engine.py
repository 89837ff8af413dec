"""The DeepSpeed engine around a model, and one optimizer step of it."""

from __future__ import annotations

import importlib
import logging
import math
import os
from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist

from unimoe_ray.config.training import OptimizerConfig, TrainingConfig
from unimoe_ray.model.routing import RoutingSums
from unimoe_ray.model.unimoe import Batch, UniMoE
from unimoe_ray.parallel.groups import split_groups

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Group:
    """Parameters that share a peak learning rate."""

    name: str
    parameters: list[torch.nn.Parameter]
    lr: float


def pick_device(config: TrainingConfig) -> torch.device:
    wanted = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def pick_precision(config: TrainingConfig, device: torch.device) -> torch.dtype:
    """bf16 on GPUs that have it; fp32 on CPUs, where bf16 products are many times slower without AVX-512 or AMX."""
    if config.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if config.precision == "bf16" and device.type == "cpu" and not fast:
        log.warning("training.precision is bf16, which this CPU computes many times slower than fp32 (auto)")
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def choose_accelerator(device: torch.device) -> None:
    """For DeepSpeed, which looks for one when it is imported; on CPUs it is told, or it warns."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def initialize(model: UniMoE, groups: list[Group], config: TrainingConfig, weight_decay: float, device: torch.device):
    """A DeepSpeed ZeRO engine with torch's AdamW on the given parameter groups, without those of experts that this rank
    does not hold. Needs an initialised process group."""
    choose_accelerator(device)
    import deepspeed
    import deepspeed.ops

    # Its C++ shared-memory op is used by inference only, and would be compiled at every first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon()
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    given = [{"params": g.parameters, "lr": g.lr, "peak_lr": g.lr, "name": g.name} for g in groups]
    optimizer = torch.optim.AdamW(
        split_groups(given, model),
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        weight_decay=weight_decay,
    )
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.clip,
        "zero_optimization": {"stage": config.zero_stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
    }
    if pick_precision(config, device) is torch.bfloat16:
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    _drop_hooks(engine)
    if dist.get_world_size() > 1:
        model.recorder.group_sum = GroupSum.apply
    return engine


def _import_muon() -> None:
    """DeepSpeed imports its Muon to know what is not Muon, and has parts of it compiled meanwhile: bringing torch's
    compiler takes a second of every start."""
    with mock.patch.object(torch, "compile", lambda function=None, **_: function or (lambda given: given)):
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


def _drop_hooks(engine) -> None:
    """ZeRO's hook on every parameter, which runs in every backward pass. ``backward_step`` has gradients reduced once,
    after the last of them: until then the hooks find out that there is nothing to do, for up to a tenth of the time."""
    while engine.optimizer._grad_acc_hooks:
        engine.optimizer._grad_acc_hooks.pop().remove()


def set_learning_rates(engine, factor: float) -> None:
    """``factor`` times the peak rate of each group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def learning_rate_factor(step: int, steps: int, config: OptimizerConfig) -> float:
    """Linear warm-up, then cosine decay to ``final_fraction``; ``step`` counts from 0."""
    warmup = max(1, round(config.warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


def backward_step(engine, batches: list[Batch], answer_tokens: int) -> tuple[torch.Tensor, RoutingSums | None]:
    """Gradients of one global batch, reduced over ranks.

    The loss is the sum of token losses over the global batch divided by its ``answer_tokens``, so neither world size
    nor accumulation changes it, plus the mean over micro-batches of the routers' loss, each over the tokens of all
    ranks. Gradients are reduced once, after the last micro-batch, in parameter order: ranks may be on different
    modalities at the same moment. All ranks bring equally many ``batches``.
    Returns this rank's summed token loss and its routing statistics by mixture layer (None of a dense model).
    """
    world = dist.get_world_size()
    total = torch.zeros((), device=engine.device)
    routing: RoutingSums | None = None
    recorder = engine.module.recorder
    with engine.coalesce_grad_reduction():
        for batch in batches:
            loss = engine(batch)
            if recorder.layers:
                with torch.no_grad():
                    sums = recorder.sums().map(torch.Tensor.detach)
                routing = sums if routing is None else routing + sums
            # DeepSpeed averages gradients over ranks; both losses are sums over them.
            engine.backward(world * (loss.token_loss / max(answer_tokens, 1) + loss.router_loss / len(batches)))
            total += loss.token_loss.detach()
    return total, routing


class GroupSum(torch.autograd.Function):
    """Sum over all ranks. Every rank computes the same function of the sum, whose gradient is therefore its own."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return grad
