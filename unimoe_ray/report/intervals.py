"""Means with intervals, one below the other, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from unimoe_ray.report.html import Html, tag
from unimoe_ray.report.plots import linear_ticks

ROW, TOP, WIDTH, RIGHT, BOTTOM = 24, 8, 760, 14, 26


@dataclass(frozen=True)
class Row:
    """low, high: nan without an interval; dots: of single runs; other: a value of somebody else's, or None."""

    name: str
    title: str
    mean: float
    low: float
    high: float
    dots: Sequence[float] = ()
    other: float | None = None


def intervals_chart(
    title: str, rows: Sequence[Row], bounds: tuple[float, float], unit: str, *, left: int, zero: bool = False
) -> Html:
    """left: room for the names; zero: a line at 0. What lies outside of ``bounds`` is drawn at the edge."""
    low, high = bounds
    height = TOP + ROW * len(rows) + BOTTOM

    def x(value: float) -> float:
        share = (min(max(value, low), high) - low) / (high - low)
        return round(left + share * (WIDTH - left - RIGHT), 1)

    parts: list[Html] = []
    for value in linear_ticks(low, high, 8):
        at = x(value)
        parts.append(tag("line", x1=at, x2=at, y1=TOP, y2=height - BOTTOM, class_="grid"))
        parts.append(tag("text", f"{value:g}{unit}", x=at, y=height - 8, text_anchor="middle"))
    if zero and low <= 0 <= high:
        parts.append(tag("line", x1=x(0), x2=x(0), y1=TOP, y2=height - BOTTOM, class_="axis"))
    for number, row in enumerate(rows):
        y = TOP + ROW * (number + 0.5)
        shown = [tag("title", row.title), tag("text", row.name, x=left - 10, y=y + 4, text_anchor="end", class_="name")]
        if math.isfinite(row.low):
            shown.append(tag("line", x1=x(row.low), x2=x(row.high), y1=y, y2=y, class_="reach"))
        shown += [tag("circle", cx=x(value), cy=y, r=3, class_="seed") for value in row.dots]
        at = x(row.mean)
        shown.append(tag("line", x1=at, x2=at, y1=y - 7, y2=y + 7, class_="mean"))
        if row.other is not None:
            at = x(row.other)
            shown.append(tag("path", d=f"M{at:g},{y - 4.5:g}l4.5,4.5l-4.5,4.5l-4.5,-4.5z", class_="other"))
        parts.append(tag("g", shown))
    drawn = tag("svg", parts, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=title)
    return tag("figure", drawn, class_="arms")
