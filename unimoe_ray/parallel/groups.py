"""Who shares what: expert-parallel ranks, and the parameter groups that DeepSpeed's engine wants of them."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from unimoe_ray.errors import UsageError

Held = tuple[tuple[int, ...], ...]  # global ids of the experts of a layer, by expert-parallel rank


def expert_parallel_size(wanted: int | Literal["auto"], world: int, experts: int) -> int:
    """Ranks that share the experts of a layer. ``auto``: as many as possible, each with an expert at least.

    Raises UsageError when ``wanted`` does not divide the world or leaves ranks without experts.
    """
    allowed = _sizes(world, experts)
    if wanted == "auto":
        return allowed[-1]
    if wanted not in allowed:
        numbers = ", ".join(map(str, allowed))
        raise UsageError(
            f"training.expert_parallel.ep_size is {wanted}; with {world} workers and {experts} experts allowed: "
            f"auto, {numbers}"
        )
    return wanted


def nearest_expert_parallel_size(wanted: int | Literal["auto"], world: int, experts: int) -> int:
    """As ``expert_parallel_size`` for a world that came to be by itself: ``wanted`` if possible, else the next larger
    size, whose ranks hold fewer experts, else the next smaller one."""
    allowed = _sizes(world, experts)
    if wanted == "auto":
        return allowed[-1]
    return min((size for size in allowed if size >= wanted), default=allowed[-1])


def _sizes(world: int, experts: int) -> list[int]:
    return [size for size in range(1, min(world, experts) + 1) if world % size == 0]


def tag_expert(expert: nn.Module, group_name: str) -> None:
    """Tell DeepSpeed that the parameters of an expert, adapters and frozen ones too, differ between ranks: they are
    broadcast and reduced over their expert-data-parallel group only."""
    for parameter in expert.parameters():
        parameter.allreduce, parameter.group_name = False, group_name


def untag_expert(expert: nn.Module) -> None:
    for parameter in expert.parameters():
        del parameter.allreduce, parameter.group_name


def split_groups(groups: list[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    """Optimizer groups of the parameters that ``model`` has, those of experts apart from those of all ranks.

    Like ``split_params_into_different_moe_groups_for_optimizer`` of DeepSpeed, but equally many groups on every rank,
    however many experts it holds: the gradient norm is reduced over all ranks group by group. Groups of experts come
    last, so that the buckets of the others fill alike everywhere. Keys of a group other than its parameters and name
    are kept.
    """
    own = {id(parameter) for parameter in model.parameters()}
    shared, experts = [], []
    for group in groups:
        parts: dict[str | None, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(getattr(parameter, "group_name", None), []).append(parameter)
        for name, parameters in parts.items():
            held = [parameter for parameter in parameters if id(parameter) in own]
            if name is None:
                shared.append(group | {"params": held})
            else:
                experts.append(group | {"params": held, "moe": True, "name": name})
    return shared + experts
