"""Experts that move to other ranks while training, with their Adam state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from unimoe_ray.parallel.expert_parallel import ExpertParallelFeedForward, parallel_layers
from unimoe_ray.parallel.groups import Held
from unimoe_ray.parallel.state import empty_state, fragments, read, set_updates_done, updates_done, write
from unimoe_ray.parallel.transfer import Message, exchange, make_storage


@dataclass(frozen=True)
class Move:
    """An expert of a mixture layer, both counted from 0, that goes to another rank of each expert-parallel group."""

    layer: int
    expert: int
    source: int
    target: int


def moved_experts(before: Sequence[Held], after: Sequence[Held]) -> list[Move]:
    """From one placement to another, by layer and expert."""
    found = []
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        source = {expert: rank for rank, ids in enumerate(old) for expert in ids}
        target = {expert: rank for rank, ids in enumerate(new) for expert in ids}
        found += [Move(layer, e, source[e], target[e]) for e in sorted(source) if source[e] != target[e]]
    return found


def relocate(engine, placement: Sequence[Held], remake: Callable[[], object]):
    """The engine with its experts placed anew: training goes on as if nothing had happened.

    placement: of each mixture, first layer first; remake: makes an engine around the same model, as the one given was
    made, which is of no use afterwards. Call it between two updates, on all ranks. What moves goes from rank to rank;
    for a moment a rank has its optimizer state twice, and that of its experts unsharded.
    """
    layers = parallel_layers(engine.module)
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    of_experts = {names[id(p)] for layer in layers for p in layer.experts.parameters() if p.requires_grad}
    updates = updates_done(engine)
    shared = {part.name: part for part in fragments(engine) if part.name not in of_experts}
    by_name = read(engine, of_experts)
    states = {p: by_name[names[id(p)]] for layer in layers for p in layer.experts.parameters() if p.requires_grad}
    _close(engine)

    planned = moved_experts([layer.held for layer in layers], placement)
    for number, layer in enumerate(layers):
        _move_experts(layer, [move for move in planned if move.layer == number], states)
        layer.hold(placement[number])

    engine = remake()
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    write(engine, {names[id(parameter)]: state for parameter, state in states.items() if id(parameter) in names})
    for part in fragments(engine):
        if part.name in shared:
            for new, old in zip(part.tensors(), shared[part.name].tensors(), strict=True):
                new.copy_(old)
    set_updates_done(engine, updates)
    return engine


def _move_experts(
    layer: ExpertParallelFeedForward, planned: Sequence[Move], states: dict[torch.nn.Parameter, torch.Tensor]
) -> None:
    """Weights of frozen parameters to where they are used, states of trained ones into ``states``."""
    group, me = divmod(dist.get_rank(), layer.ep_size)
    first = group * layer.ep_size
    messages = []
    for move in planned:
        if me not in (move.source, move.target):
            continue
        expert = layer.whole.experts[move.expert]
        if me == move.target:
            make_storage(expert)
        frozen, trained = [], []
        for parameter in expert.parameters():
            if not parameter.requires_grad:
                frozen.append(parameter.data)
            elif me == move.target:
                trained.append(states.setdefault(parameter, empty_state(parameter)))
            else:
                trained.append(states.pop(parameter))
        ends = first + move.source, first + move.target
        messages += [Message(*ends, tensors) for tensors in (frozen, trained) if tensors]
    exchange(messages)


def _close(engine) -> None:
    """Take an engine's hooks off its model. ``destroy`` leaves those of the module, and would be called once more when
    the engine is collected, which takes its links to the optimizer away from parameters that are another's by then."""
    engine.destroy()
    engine.optimizer = None
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
