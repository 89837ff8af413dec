"""How a run's routing developed, condensed while its lines are read: the memory does not grow with the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

MAX_BINS = 48


@dataclass
class Bin:
    """Consecutive steps: the first and the last, how many, and sums over them.

    tokens: routed slots [L, E] by kind of token; entropy, busiest: of the router's and the busiest expert's share [L]
    """

    first: int
    last: int
    count: int
    tokens: dict[str, np.ndarray]
    entropy: np.ndarray
    busiest: np.ndarray

    def add(self, other: Bin) -> None:
        self.last, self.count = other.last, self.count + other.count
        for kind, counts in other.tokens.items():
            self.tokens[kind] = self.tokens[kind] + counts if kind in self.tokens else counts
        self.entropy, self.busiest = self.entropy + other.entropy, self.busiest + other.busiest


@dataclass
class RoutingHistory:
    """At most ``2 * MAX_BINS`` bins of ``width`` lines each, the last one perhaps of fewer."""

    bins: list[Bin] = field(default_factory=list)
    width: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and experts."""
        return next(iter(self.bins[0].tokens.values())).shape

    def add(self, step: int, record: dict[str, Any]) -> None:
        """A line of ``metrics.jsonl``. Raises ValueError or TypeError where it is damaged. Lines without routing, of a
        dense model or another version, count for nothing."""
        given = record.get("expert_tokens")
        if not given:
            return
        tokens = {str(kind): np.asarray(counts, dtype=np.int64) for kind, counts in given.items()}
        shape = self.shape if self.bins else next(iter(tokens.values())).shape
        entropy, busiest = (
            np.asarray(record.get(key, [np.nan] * shape[0]), np.float64) for key in ("router_entropy", "busiest_share")
        )
        fits = len(shape) == 2 and all(counts.shape == shape for counts in tokens.values())
        if not fits or {entropy.shape, busiest.shape} != {shape[:1]}:
            raise ValueError("expert loads of different shapes")
        new = Bin(step, step, 1, tokens, entropy, busiest)
        while self.bins and self.bins[-1].first >= step:  # steps done again
            self.bins.pop()
        if self.bins and self.bins[-1].count < self.width:
            self.bins[-1].add(new)
            return
        if len(self.bins) == 2 * MAX_BINS:
            for even, odd in zip(self.bins[::2], self.bins[1::2], strict=True):
                even.add(odd)
            self.bins, self.width = self.bins[::2], 2 * self.width
        self.bins.append(new)

    def shares(self, kind: str | None) -> np.ndarray:
        """[bins, L, E]: part of a layer's routed slots of one kind of token, or of all; NaN where it had none."""
        empty = np.zeros(self.shape, np.int64)
        counts = np.stack(
            [sum(b.tokens.values(), empty) if kind is None else b.tokens.get(kind, empty) for b in self.bins]
        ).astype(np.float64)
        total = counts.sum(-1, keepdims=True)
        return np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)

    def means(self, name: str) -> np.ndarray:
        """[bins, L] of ``entropy`` or ``busiest``."""
        return np.stack([getattr(b, name) / b.count for b in self.bins])

    def kinds(self) -> list[str]:
        return list(dict.fromkeys(kind for b in self.bins for kind in b.tokens))

    def middles(self) -> list[float]:
        """The step in the middle of each bin."""
        return [(b.first + b.last) / 2 for b in self.bins]
