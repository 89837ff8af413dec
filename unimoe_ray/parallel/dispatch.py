"""Rows of tokens to the ranks that hold their experts, and back: uneven all-to-all with autograd.

Each rank sends its rows sorted by the rank that holds their expert, then by expert. They arrive sorted by sender, then
by expert; the experts want them by expert, then by sender. Nothing is padded or dropped.

The counts travel while rows are gathered, and the gradients of rows while those of the experts' weights are computed
(``Traffic.send_gradients``). The other three exchanges of a layer have nothing beside them that does not wait for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Traffic:
    """The rows that R ranks exchange, as one of them sees it, which holds L experts.

    sent [R]: rows for each rank; received [R][L]: rows from each rank for each expert held here
    """

    group: dist.ProcessGroup
    sent: list[int]
    received: list[list[int]]
    _on_their_way: list[Callable[[], torch.Tensor]] = field(default_factory=list)

    @property
    def counts(self) -> list[int]:
        """[L]: rows of each expert held here."""
        return [sum(rows) for rows in zip(*self.received, strict=True)]

    def deliver(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [sum(sent), H] to the ranks of their experts: [sum(counts), H], by expert, then by sender."""
        arrived = self._begin(rows, self.sent, [sum(sizes) for sizes in self.received])()
        return _swap_blocks(arrived, self.received)

    def give_back(self, rows: torch.Tensor) -> torch.Tensor:
        """What ``deliver`` did, undone: [sum(counts), H] to [sum(sent), H] on the ranks they came from."""
        return self._begin_giving_back(rows)()

    def send_gradients(self, rows: torch.Tensor) -> None:
        """Begin ``give_back`` of the gradients of what was delivered; the backward pass of ``deliver`` waits for it.
        ``rows`` must stay as they are until then."""
        self._on_their_way.append(self._begin_giving_back(rows))

    def gradients(self, rows: torch.Tensor) -> torch.Tensor:
        """``give_back`` of gradients, as far as that has not begun."""
        return self._on_their_way.pop()() if self._on_their_way else self.give_back(rows)

    def _begin_giving_back(self, rows: torch.Tensor) -> Callable[[], torch.Tensor]:
        by_expert = [list(sizes) for sizes in zip(*self.received, strict=True)]
        return self._begin(_swap_blocks(rows, by_expert), [sum(sizes) for sizes in self.received], self.sent)

    def _begin(self, rows: torch.Tensor, sent: list[int], received: list[int]) -> Callable[[], torch.Tensor]:
        rows, arrived = rows.contiguous(), rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(arrived, rows, received, sent, group=self.group, async_op=True)

        def end() -> torch.Tensor:
            work.wait()
            return arrived

        return end


def announce(counts: torch.Tensor, held: Sequence[int], group: dist.ProcessGroup) -> Callable[[], Traffic]:
    """Tell the other ranks how many rows each of their experts will get.

    counts [E] int64: this rank's rows for each expert, in the order of the ranks; held [R]: experts of each rank.
    Call the result when the traffic is needed: the numbers travel meanwhile. That call is the only one here that waits
    for the device.
    """
    mine = held[dist.get_rank(group)]
    arrived = counts.new_empty(len(held) * mine)
    work = dist.all_to_all_single(arrived, counts, [mine] * len(held), list(held), group=group, async_op=True)

    def traffic() -> Traffic:
        work.wait()
        numbers = torch.cat([counts, arrived]).tolist()
        sent, received, start = [], [], 0
        for experts in held:
            sent.append(sum(numbers[start : start + experts]))
            start += experts
        for _ in held:
            received.append(numbers[start : start + mine])
            start += mine
        return Traffic(group, sent, received)

    return traffic


def deliver(rows: torch.Tensor, traffic: Traffic) -> torch.Tensor:
    """``Traffic.deliver`` with gradients."""
    return _Deliver.apply(rows, traffic)


def give_back(rows: torch.Tensor, traffic: Traffic) -> torch.Tensor:
    """``Traffic.give_back`` with gradients. All ranks take part in its backward pass or none: one whose experts got no
    gradient path of their own, for want of rows or of experts, must not be missing."""
    if torch.is_grad_enabled() and not rows.requires_grad:
        rows = rows.detach().requires_grad_()
    return _GiveBack.apply(rows, traffic)


class _Deliver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: torch.Tensor, traffic: Traffic) -> torch.Tensor:
        ctx.traffic = traffic
        return traffic.deliver(rows)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.traffic.gradients(grad), None


class _GiveBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: torch.Tensor, traffic: Traffic) -> torch.Tensor:
        ctx.traffic = traffic
        return traffic.give_back(rows)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.traffic.deliver(grad), None


def _swap_blocks(rows: torch.Tensor, sizes: list[list[int]]) -> torch.Tensor:
    """Rows in blocks of ``sizes`` [A][B], A-major, to B-major."""
    outer, inner = len(sizes), len(sizes[0]) if sizes else 0
    if outer <= 1 or inner <= 1:
        return rows
    blocks = rows.split([size for block in sizes for size in block])
    return torch.cat([blocks[a * inner + b] for b in range(inner) for a in range(outer)])
