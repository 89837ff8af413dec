"""Weights and Adam state of a DeepSpeed ZeRO-1 or 2 engine by parameter name, which has global expert ids in it.

The engine lays the parameters of each optimizer group end to end in a flat buffer and gives each rank of the group's
data-parallel ranks one part of it, to update with fp32 weights and moments. What a rank has is therefore a fragment of
some parameters. These functions read and write fragments where they lie; they use names of DeepSpeed that are not
public (``constraints.txt`` pins the version).
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Fragment:
    """A part of a parameter that this rank updates. The tensors are views of the engine's buffers, [n], fp32.

    name: of the parameter, in the model; start: of the part, in the flattened parameter; weight: the optimizer's own;
    exp_avg, exp_avg_sq: Adam's moments
    """

    name: str
    start: int
    weight: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.weight, self.exp_avg, self.exp_avg_sq

    def parts_of(self, whole: torch.Tensor) -> torch.Tensor:
        """Views of where the tensors lie in a whole state [3, ...]: [3, n]."""
        return whole.view(3, -1)[:, self.start : self.start + len(self.weight)]


def fragments(engine) -> Iterator[Fragment]:
    """What this rank updates of each trained parameter, in the order of the engine. No communication."""
    optimizer = engine.optimizer
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    for parameters, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        state = _adam_state(optimizer.optimizer, flat)
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is not None:
                here, start = mapping.hp_fragment_address, mapping.lp_fragment_address.start
                buffers = flat.detach(), state["exp_avg"], state["exp_avg_sq"]
                yield Fragment(names[id(parameter)], start, *(b.narrow(0, here.start, here.numel) for b in buffers))


def empty_state(parameter: torch.Tensor) -> torch.Tensor:
    """[3, ...]: weight, exp_avg and exp_avg_sq of a whole parameter, fp32; zeros."""
    return parameter.new_zeros(3, *parameter.shape, dtype=torch.float32)


def read(engine, names: Container[str] | None = None) -> dict[str, torch.Tensor]:
    """States [3, ...] of whole parameters, put together from the ranks that have fragments of them; ``names``: of these
    only. All ranks that hold a parameter must ask for it."""
    mine = {fragment.name: fragment for fragment in fragments(engine)}
    states = {}
    for name, parameter in trained_parameters(engine):
        if names is None or name in names:
            states[name] = state = empty_state(parameter)
            if name in mine:
                mine[name].parts_of(state).copy_(torch.stack(mine[name].tensors()))
            if dist.get_world_size(parameter._dp_group) > 1:
                dist.all_reduce(state, group=parameter._dp_group)
    return states


@torch.no_grad()
def write(engine, states: Mapping[str, torch.Tensor]) -> None:
    """Set trained parameters and their moments. No communication: all ranks that hold a parameter must be given its
    state [3, ...]."""
    for name, parameter in trained_parameters(engine):
        if name in states:
            parameter.copy_(states[name][0])
    for fragment in fragments(engine):
        if fragment.name in states:
            for own, part in zip(fragment.tensors(), fragment.parts_of(states[fragment.name]), strict=True):
                own.copy_(part)


def trained_parameters(engine) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Of this rank, in the order of the engine's groups, which is the same on all ranks that hold them."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    for parameters in engine.optimizer.bit16_groups:
        for parameter in parameters:
            yield names[id(parameter)], parameter


def updates_done(engine) -> int:
    """How often the optimizer has updated the parameters: Adam's step."""
    optimizer = engine.optimizer
    return int(_adam_state(optimizer.optimizer, optimizer.single_partition_of_fp32_groups[0])["step"])


def set_updates_done(engine, step: int) -> None:
    for flat in engine.optimizer.single_partition_of_fp32_groups:
        _adam_state(engine.optimizer.optimizer, flat)["step"].fill_(step)


def _adam_state(adam: torch.optim.Optimizer, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """Torch makes it at the first update only."""
    state = adam.state[flat]
    if not state:
        state["step"] = torch.zeros(())
        state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(flat, requires_grad=False) for _ in range(2))
    return state
