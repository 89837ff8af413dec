"""Tensors from rank to rank: those of experts that move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class Message:
    """Tensors of one dtype and device, one or more, that ``source`` sends and ``target`` receives in place; both are
    global ranks."""

    source: int
    target: int
    tensors: Sequence[torch.Tensor]


@torch.no_grad()
def exchange(messages: Sequence[Message]) -> None:
    """Deliver messages, all at once. Each travels in one piece, between its two ranks alone, which must both name it,
    and in the same order if there are several; other ranks may name it too."""
    rank = dist.get_rank()
    operations, arriving = [], []
    for message in messages:
        if rank == message.source:
            flat = torch.cat([tensor.reshape(-1) for tensor in message.tensors])
            operations.append(dist.P2POp(dist.isend, flat, message.target))
        elif rank == message.target:
            flat = message.tensors[0].new_empty(sum(tensor.numel() for tensor in message.tensors))
            operations.append(dist.P2POp(dist.irecv, flat, message.source))
            arriving.append((flat, message.tensors))
    if not operations:
        return
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    for flat, tensors in arriving:
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def clear_storage(module: nn.Module) -> None:
    """Free the memory of a module's parameters, which keep their identity and shape. Until ``make_storage`` they must
    not be used."""
    for parameter in module.parameters():
        parameter.data = parameter.data.new_zeros(()).expand(parameter.shape)
        parameter.grad = None


def make_storage(module: nn.Module) -> None:
    """Memory for parameters whose storage was cleared; what is in it is undefined."""
    for parameter in module.parameters():
        parameter.data = torch.empty_like(parameter.data, memory_format=torch.contiguous_format)
