"""Which worker holds which experts of the mixtures, at the start and at the end of a run."""

from __future__ import annotations

import torch
import torch.distributed as dist

from unimoe_ray.config.training import TrainingConfig
from unimoe_ray.model.language import mixtures
from unimoe_ray.model.unimoe import UniMoE
from unimoe_ray.parallel.groups import contiguous, expert_parallel_size
from unimoe_ray.training.engine import choose_accelerator


def spread_experts(model: UniMoE, config: TrainingConfig, device: torch.device) -> None:
    """Drop the experts that other workers hold, as configured. Raises UsageError as ``expert_parallel_size``."""
    layers = mixtures(model)
    experts = model.config.moe.num_experts
    if not layers:
        return
    ranks = expert_parallel_size(config.expert_parallel.ep_size, dist.get_world_size(), experts)
    if ranks > 1:
        choose_accelerator(device)
        from unimoe_ray.parallel.expert_parallel import distribute

        distribute(model, [contiguous(experts, ranks)] * len(layers))


def collect_experts(model: UniMoE) -> None:
    """All experts on rank 0 again."""
    from unimoe_ray.parallel.expert_parallel import gather

    gather(model)
