"""Loss curves as inline SVG, heat maps and accuracy bars: colours come from the page's style sheet."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np

from unimoe_ray.report.html import Html, tag
from unimoe_ray.report.read import Curve

WIDTH, HEIGHT = 380, 220
LEFT, RIGHT, TOP, BOTTOM = 42, 10, 10, 26
MAX_POINTS = 500
MAX_NUMBERS = 16  # columns of a heat map that has its numbers in it
LEVELS = 20  # colours of a strip
Z_95 = 1.959964
PALETTE = ("text", "image", "video", "speech", "audio", "answer", "base")


def colour_of(name: str) -> str:
    """The style sheet's class for a modality, an expert or a run; the accent for other names."""
    last = name.split("/")[-1].split("-")[0]
    return f"c-{last}" if last in PALETTE else "c-accent"


def wilson(accuracy: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share measured on ``n`` answers (Wilson 1927, score interval)."""
    z2 = Z_95 * Z_95 / n
    middle = (accuracy + z2 / 2) / (1 + z2)
    half = Z_95 / (1 + z2) * math.sqrt(accuracy * (1 - accuracy) / n + z2 / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def loss_chart(curve: Curve) -> Html | None:
    """The loss of one run, raw and smoothed, once on a linear and once on a logarithmic scale; None without losses."""
    steps, low, mean, high = condense(curve.steps, curve.losses, MAX_POINTS)
    if not len(steps):
        return None
    smooth = smoothed(mean)
    title = f"Loss of {curve.run}, from {smooth[0]:.3g} at step {steps[0]} to {smooth[-1]:.3g} at step {steps[-1]}"
    x1, top = max(steps[-1], steps[0] + 1), float(high.max())
    linear = Axes(steps[0], x1, min(0.0, float(low.min())), max(0.0, top) or 1.0, log=False)
    charts = [_draw(linear, curve, steps, low, mean, high, smooth, title)]
    floor = float(low.min())
    if floor > 0:
        log = Axes(linear.x0, linear.x1, floor / 1.1, top * 1.1, log=True)
        charts.append(_draw(log, curve, steps, low, mean, high, smooth, title))
    else:
        charts.append(tag("p", "The loss reaches 0: no logarithmic scale.", class_="missing scale-log"))
    points = [[int(s), _digits(raw), _digits(even)] for s, raw, even in zip(steps, mean, smooth, strict=True)]
    kind = colour_of(curve.run)
    caption = tag(
        "figcaption",
        tag("span", class_="dot"),
        tag("strong", curve.run),
        tag("output", f"{smooth[0]:.3g} → {smooth[-1]:.3g}", class_="readout num"),
    )
    return tag(
        "figure",
        caption,
        charts,
        class_=f"chart {kind}",
        data_points=json.dumps(points, separators=(",", ":")),
    )


def _digits(value: float) -> float:
    return float(f"{value:.5g}")


def condense(steps: Sequence[int], losses: Sequence[float], limit: int) -> tuple[np.ndarray, ...]:
    """At most ``limit`` points (step, lowest, mean, highest loss), each of about as many steps; without NaN and inf."""
    x, y = np.asarray(steps, dtype=np.int64), np.asarray(losses, dtype=np.float64)
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= limit:
        return x, y, y, y
    starts = np.linspace(0, len(x), limit, endpoint=False).astype(np.int64)
    counts = np.diff(np.append(starts, len(x)))
    middles = starts + (counts - 1) // 2
    middles[-1] = len(x) - 1
    mean = np.add.reduceat(y, starts) / counts
    return x[middles], np.minimum.reduceat(y, starts), mean, np.maximum.reduceat(y, starts)


def smoothed(values: np.ndarray) -> np.ndarray:
    """A centred Gaussian average over about a twentieth of the run, with fewer neighbours at the ends."""
    n = len(values)
    if n < 5:
        return values
    reach = max(2, n // 20)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / (reach / 2)) ** 2)
    total = np.convolve(values, weights, mode="full")[reach : reach + n]
    return total / np.convolve(np.ones(n), weights, mode="full")[reach : reach + n]


class Axes:
    """Data to picture coordinates. size: width of the picture, and what is free at the right of it."""

    def __init__(
        self,
        x0: float,
        x1: float,
        y0: float,
        y1: float,
        log: bool,
        size: tuple[int, int] = (WIDTH, RIGHT),
    ):
        self.x0, self.x1, self.y0, self.y1, self.log = float(x0), float(x1), y0, y1, log
        self.end = size[0] - size[1]

    def x(self, value: float) -> float:
        return round(LEFT + (value - self.x0) / (self.x1 - self.x0) * (self.end - LEFT), 1)

    def y(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.y0) / math.log(self.y1 / self.y0)
        else:
            share = (value - self.y0) / (self.y1 - self.y0)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def path(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        return "M" + "L".join(f"{self.x(a):g},{self.y(b):g}" for a, b in zip(xs, ys, strict=True))


def _draw(axes: Axes, curve: Curve, steps, low, mean, high, smooth, title: str) -> Html:
    parts: list[Html] = [tag("title", title)]
    for value in log_ticks(axes.y0, axes.y1) if axes.log else linear_ticks(axes.y0, axes.y1):
        y = axes.y(value)
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", f"{value:g}", x=LEFT - 7, y=y + 3.5, text_anchor="end"))
    for value in linear_ticks(axes.x0, axes.x1, whole=True):
        parts.append(tag("text", f"{value:g}", x=axes.x(value), y=HEIGHT - 8, text_anchor="middle"))
    parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, class_="axis"))
    if len(curve.steps) > MAX_POINTS:
        band = axes.path(steps, high) + "L" + axes.path(steps[::-1], low[::-1])[1:] + "Z"
        parts.append(tag("path", d=band, class_="band"))
    else:
        parts.append(tag("path", d=axes.path(steps, mean), class_="raw"))
    parts.append(tag("path", d=axes.path(steps, smooth), class_="smooth"))
    if len(steps) == 1:
        parts.append(tag("circle", cx=axes.x(steps[0]), cy=axes.y(mean[0]), r=3, class_="point"))
    parts.append(tag("line", y1=TOP, y2=HEIGHT - BOTTOM, class_="cross", visibility="hidden"))
    parts.append(tag("circle", r=3.5, class_="mark", visibility="hidden"))
    return tag(
        "svg",
        parts,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=title,
        tabindex=0,
        class_="scale-log" if axes.log else "scale-linear",
        data_axes=json.dumps([axes.x0, axes.x1, axes.y0, axes.y1, int(axes.log)]),
    )


def linear_ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """Round values between low and high, about ``count`` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    if whole:
        step = max(1.0, step)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 between them where they fit; at most about seven."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{m}e{d}") for d in decades for m in multiples if low <= m * 10.0**d <= high]
        if len(ticks) <= 7:
            break
    ticks = ticks[:: max(1, -(-len(ticks) // 7))]
    return ticks if len(ticks) >= 2 else [float(f"{value:.2g}") for value in (low * 1.05, high / 1.05)]


def accuracy_bar(accuracy: float, majority: float, n: int) -> Html:
    """A bar of the accuracy, a whisker of its 95 % interval, a tick at the majority answer's share."""
    low, high = wilson(accuracy, n)
    return tag(
        "span",
        tag("span", class_="fill", style=f"width:{100 * accuracy:.2f}%"),
        tag("span", class_="whisker", style=f"left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"),
        tag("span", class_="majority", style=f"left:{100 * majority:.2f}%"),
        class_="bar",
        aria_hidden="true",
    )


def heat_map(modality: str, layers: list[list[float]], experts: Sequence[str], full: float) -> Html:
    """Share of the routed slots per expert (columns) and MoE layer (rows), as a table with coloured cells.

    A share of ``full`` has the full colour.
    """
    columns = max(map(len, layers))
    numbers = columns <= MAX_NUMBERS
    names = [experts[e] if e < len(experts) else f"expert {e}" for e in range(columns)]
    heads = names if numbers else range(columns)
    head = tag("tr", tag("th", "layer", scope="col"), [tag("th", name, scope="col") for name in heads])
    rows = [
        tag("tr", tag("th", number, scope="row"), [_cell(share, share / full, numbers) for share in shares])
        for number, shares in enumerate(layers, 1)
    ]
    caption = tag("figcaption", tag("span", class_="dot"), tag("strong", modality))
    table = tag("table", tag("thead", head), tag("tbody", rows), aria_label=f"Expert load of {modality} tokens")
    if numbers:
        return tag("figure", caption, table, class_=f"map {colour_of(modality)}")
    return tag("figure", caption, tag("div", table, class_="scroll"), class_=f"map dense {colour_of(modality)}")


def _cell(share: float, depth: float, number: bool) -> Html:
    """With its number in it, or of many small ones, to be read by pointing at it."""
    if not number:
        return tag("td", style=f"--depth:{100 * depth:.1f}%", title=f"{100 * share:.1f} %")
    ink = "strong" if depth > 0.8 else "middling" if depth > 0.65 else None
    return tag("td", f"{100 * share:.0f}", style=f"--depth:{100 * depth:.1f}%", class_=ink)


def heat_strips(
    title: str,
    rows: Sequence[str],
    shares: np.ndarray,
    spans: Sequence[tuple[int, int]],
    full: float,
    what: str,
    colour: str,
) -> Html:
    """A row of cells per name, a column per span of steps (first, last), as coloured as its share; NaN stays empty.

    shares [rows, spans]; a share of ``full`` has the full colour. The first and the last share stand beside each row
    as numbers; the page's script reads off the others.
    """
    count = len(spans)
    cells: dict[int, list[str]] = {}
    for row, values in enumerate(shares):
        for column, share in enumerate(values):
            if np.isfinite(share):
                level = round(LEVELS * min(share / full, 1.0))
                cells.setdefault(level, []).append(f"M{column},{row}h1v1h-1z")
    paths = [
        tag("path", d="".join(parts), style=f"--depth:{100 * level / LEVELS:.0f}%", class_="cell")
        for level, parts in sorted(cells.items())
    ]
    drawn = tag(
        "svg",
        paths,
        tag("rect", width=1, height=len(rows), visibility="hidden", class_="cursor"),
        viewBox=f"0 0 {count} {len(rows)}",
        preserveAspectRatio="none",
        role="img",
        tabindex=0,
        aria_label=f"{title}, {what}, from step {spans[0][0]} to {spans[-1][1]}",
    )
    labels = []
    for name, values in zip(rows, shares, strict=True):
        known = values[np.isfinite(values)]
        ends = f"{100 * known[0]:.0f} → {100 * known[-1]:.0f}" if len(known) else "–"
        labels.append((tag("span", name, title=name), tag("span", ends)))
    table = {
        "rows": list(rows),
        "spans": [list(span) for span in spans],
        "shares": [[None if not np.isfinite(v) else round(100 * float(v), 1) for v in values] for values in shares],
    }
    steps = tag("p", tag("span", f"step {spans[0][0]}"), tag("span", spans[-1][1]), class_="span num")
    return tag(
        "figure",
        tag("figcaption", tag("strong", title), tag("output", "first → last, %", class_="readout num")),
        tag(
            "div",
            tag("div", [name for name, _ in labels], class_="names"),
            drawn,
            tag("div", [ends for _, ends in labels], class_="ends num"),
            class_="grid-of",
            style=f"--rows:{len(rows)}",
        ),
        steps,
        class_=f"strip {colour}",
        data_strip=json.dumps(table, separators=(",", ":")),
    )
