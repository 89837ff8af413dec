"""The KV cache: one arena of tokens per layer; every sequence owns one contiguous extent of it.

An extent is reserved for all tokens that its sequence may ever have, so a running sequence is never evicted, and
attention reads keys and values where they lie: views, no copies, no block tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Extent:
    start: int
    size: int


class KVArena:
    """keys, values: per layer [kv_tokens, kv heads, head dim]."""

    def __init__(
        self,
        num_layers: int,
        kv_tokens: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        shape = (kv_tokens, num_kv_heads, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.kv_tokens = kv_tokens
        self._free = [Extent(0, kv_tokens)]

    @property
    def free_tokens(self) -> int:
        return sum(extent.size for extent in self._free)

    def allocate(self, size: int) -> Extent | None:
        """The smallest hole that is large enough (first of equals); None when there is none."""
        holes = [extent for extent in self._free if extent.size >= size]
        if not holes:
            return None
        hole = min(holes, key=lambda extent: (extent.size, extent.start))
        self._free.remove(hole)
        if hole.size > size:
            self._free.append(Extent(hole.start + size, hole.size - size))
        return Extent(hole.start, size)

    def copy(self, source: int, to: int, tokens: int) -> None:
        """Keys and values of so many tokens of one extent to another."""
        for values in (*self.keys, *self.values):
            values[to : to + tokens] = values[source : source + tokens]

    def release(self, extent: Extent) -> None:
        """Give an extent back; it joins the holes beside it."""
        self._free.append(extent)
        self._free.sort(key=lambda hole: hole.start)
        joined: list[Extent] = []
        for hole in self._free:
            if joined and joined[-1].start + joined[-1].size == hole.start:
                hole = Extent(joined[-1].start, joined.pop().size + hole.size)
            joined.append(hole)
        self._free = joined
