"""Charts of several lines, each labelled at its end, as inline SVG."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unimoe_ray.report.html import Html, tag
from unimoe_ray.report.plots import BOTTOM, HEIGHT, LEFT, TOP, Axes, linear_ticks

WIDTH, RIGHT = 480, 84
LABEL_GAP = 12.5


@dataclass(frozen=True)
class Series:
    """A line: its label, values (NaN: a gap), inline style or None, and class, which give it its colour."""

    name: str
    values: np.ndarray
    style: str | None
    colour: str


def lines_chart(
    title: str,
    steps: Sequence[float],
    series: list[Series],
    bounds: tuple[float, float],
    mark: tuple[float, str] | None,
) -> Html:
    """``mark``: a value to compare with, and what it is."""
    axes = Axes(steps[0], max(steps[-1], steps[0] + 1), *bounds, log=False, size=(WIDTH, RIGHT))
    parts: list[Html] = [tag("title", title)]
    for value in linear_ticks(*bounds):
        y = axes.y(value)
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", f"{value:g}", x=LEFT - 7, y=y + 3.5, text_anchor="end"))
    for value in linear_ticks(axes.x0, axes.x1, whole=True):
        parts.append(tag("text", f"{value:g}", x=axes.x(value), y=HEIGHT - 8, text_anchor="middle"))
    parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, class_="axis"))
    if mark is not None:
        y = axes.y(mark[0])
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="mark-line"))
        low = y > HEIGHT - BOTTOM - 14
        parts.append(
            tag("text", mark[1], x=WIDTH - RIGHT, y=y - 4 if low else y + 13, text_anchor="end", class_="mark-text")
        )
    drawn = [line for line in series if np.isfinite(line.values).any()]
    ends = [line.values[np.isfinite(line.values)][-1] for line in drawn]
    for line, label_y in zip(
        drawn, spread([axes.y(end) for end in ends], LABEL_GAP, TOP, HEIGHT - BOTTOM), strict=True
    ):
        known = np.isfinite(line.values)
        xs, ys = np.asarray(steps)[known], line.values[known]
        if len(xs) == 1:
            parts.append(
                tag("circle", cx=axes.x(xs[0]), cy=axes.y(ys[0]), r=3, class_=f"point {line.colour}", style=line.style)
            )
        else:
            parts.append(tag("path", d=axes.path(xs, ys), class_=f"line {line.colour}", style=line.style))
        label = dict(x=WIDTH - RIGHT + 6, y=round(label_y + 3.5, 1), class_=f"end {line.colour}", style=line.style)
        parts.append(tag("text", line.name, **label))
    parts.append(tag("line", y1=TOP, y2=HEIGHT - BOTTOM, class_="cross", visibility="hidden"))
    summary = ", ".join(f"{line.name} {end:.3g}" for line, end in zip(drawn, ends, strict=True))
    table = {
        "steps": [round(float(step)) for step in steps],
        "names": [line.name for line in drawn],
        "values": [[None if not np.isfinite(v) else float(f"{v:.4g}") for v in line.values] for line in drawn],
        "x": [axes.x(step) for step in steps],
    }
    return tag(
        "figure",
        tag("figcaption", tag("strong", title)),
        tag(
            "svg",
            parts,
            viewBox=f"0 0 {WIDTH} {HEIGHT}",
            role="img",
            tabindex=0,
            aria_label=f"{title}, at the end: {summary}",
        ),
        tag("output", class_="readout num"),
        class_="lines",
        data_lines=json.dumps(table, separators=(",", ":")),
    )


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places moved apart to at least ``gap`` where there is room, in the same order, within low and high."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    gap = min(gap, (high - low) / max(len(places) - 1, 1))
    out = list(places)
    for before, now in zip([None, *order], order, strict=False):
        out[now] = max(out[now], low if before is None else out[before] + gap)
    for after, now in zip([None, *order[::-1]], order[::-1], strict=False):
        out[now] = min(out[now], high if after is None else out[after] - gap)
    return out
