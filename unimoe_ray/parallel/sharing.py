"""How the rows of one step are shared out between the places of an expert that has several.

The planner gives hot experts second places by the loads of the past. Who sends the rows knows those of this very step
before it sends any, so the shares need not drift away from the load, as places do.
"""

from __future__ import annotations

from collections.abc import Sequence

# Rows that cost an expert no more than the reading of its weights, roughly: fewer are not divided. On CPUs it is some
# 7 rows of fp32, on GPUs some hundred.
FEW = 16
# Rounds over the shared experts. Two come close to where many lead.
ROUNDS = 3


def share_out(rows: Sequence[int], ranks: Sequence[Sequence[int]]) -> list[list[int]]:
    """So that the rank with the most to do has as little as can be: for each of E experts the rows [C] that each of its
    places gets, in their order.

    rows [E]: of each expert in this step; ranks [E][C]: those that hold it.
    """
    work = [0] * (1 + max(rank for places in ranks for rank in places))
    shares = [[count] + [0] * (len(places) - 1) for count, places in zip(rows, ranks, strict=True)]
    for share, places in zip(shares, ranks, strict=True):
        if len(places) == 1:
            work[places[0]] += _cost(share[0])
    shared = sorted((e for e, places in enumerate(ranks) if len(places) > 1 and rows[e]), key=lambda e: -rows[e])
    for number in range(ROUNDS):
        changed = False
        for expert in shared:
            places, old = ranks[expert], shares[expert]
            if number:
                for rank, count in zip(places, old, strict=True):
                    work[rank] -= _cost(count)
            new = shares[expert] = _level([work[rank] for rank in places], rows[expert])
            for rank, count in zip(places, new, strict=True):
                work[rank] += _cost(count)
            changed |= new != old
        if not changed:
            break
    return shares


def _cost(rows: int) -> int:
    return max(rows, FEW) if rows else 0


def _level(heights: list[int], rows: int) -> list[int]:
    """Rows poured on ``heights`` so that they lie level on the lowest, in parts of at least ``FEW``."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    for used in range(min(len(order), max(1, rows // FEW)), 0, -1):
        lowest = order[:used]
        level, rest = divmod(rows + sum(heights[place] for place in lowest), used)
        parts = [level - heights[place] + (number < rest) for number, place in enumerate(lowest)]
        if used == 1 or parts[-1] >= FEW:
            break
    share = [0] * len(heights)
    for place, part in zip(lowest, parts, strict=True):
        share[place] = part
    return share
