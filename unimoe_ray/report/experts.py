"""The part of the page about experts: what was remarked on, where held-out tokens go, how it came to that."""

from __future__ import annotations

import math

import numpy as np

from unimoe_ray.report.html import Child, Html, missing, tag
from unimoe_ray.report.lines import Series, lines_chart
from unimoe_ray.report.plots import colour_of, heat_map, heat_strips
from unimoe_ray.report.read import Curve, RunData
from unimoe_ray.report.words import count

_ORDER = ("text", "image", "video", "speech", "audio", "answer")
# Larger models have a strip per layer, of its busiest expert, instead of one per expert.
MAX_EXPERTS, MAX_LAYERS = 16, 12
SIGNATURE_NAMES = {
    "collapse": "collapse",
    "dead": "dead expert",
    "imbalance": "uneven loads",
    "validation": "one modality gets worse",
    "divergence": "divergence",
    "skipped": "step left out",
    "checkpoint": "checkpoint",
}


def findings(data: RunData) -> Child:
    """What the watch said while training, and until when it held."""
    watched = [curve for curve in data.curves if curve.steps]
    if not watched:
        return missing("No training steps yet.")
    begun = [finding for finding in data.findings if not finding.get("over")]
    if not begun:
        text = "Nothing to remark on: no router collapsed, no expert died, loads stayed even enough, no loss diverged."
        return tag("p", text, class_="lead")
    items = [_finding(finding, _end(finding, data.findings)) for finding in begun]
    runs = len({finding["run"] for finding in begun})
    lead = f"{count(len(begun), 'remark')} on {count(runs, 'run')}. Layers count from 1, experts from 0."
    return [tag("p", lead, class_="lead"), tag("ul", items, class_="findings")]


def _finding(finding: dict, end: int | None) -> Html:
    name = SIGNATURE_NAMES.get(finding["signature"], finding["signature"])
    when = f"from step {finding['since']} to {end}" if end else f"since step {finding['since']}"
    text = finding["text"]
    return tag(
        "li",
        tag("p", tag("strong", name), tag("span", finding["run"], ", ", when, class_="muted"), class_="what"),
        tag("p", text[:1].upper() + text[1:] + "."),
        class_="over" if end else None,
    )


def _end(finding: dict, all_findings: list[dict]) -> int | None:
    """The last step at which a finding held, if it is over."""

    def place(of: dict) -> tuple:
        experts = of.get("experts") if of["signature"] == "dead" else None
        return of["run"], of["signature"], of.get("layer"), of.get("group"), tuple(experts or ())

    ends = [f["since"] - 1 for f in all_findings if f.get("over") and place(f) == place(finding)]
    return min((step for step in ends if step >= finding["step"]), default=None)


def experts(data: RunData) -> Child:
    """Heat maps of held-out tokens by modality, then how each run's routing developed."""
    developed = [_development(curve, data.experts, number) for number, curve in enumerate(data.curves)]
    return [_held_out(data), [part for part in developed if part]]


def _held_out(data: RunData) -> Child:
    load = (data.routing or {}).get("load")
    if not load:
        return missing("No routing report: the model has no experts yet, or it has not been evaluated.")
    layers = [layer for modality in load.values() for layer in modality]
    even = 1 / max(map(len, layers), default=1)
    lead = (
        "Where held-out tokens of each kind go: per cent of the routed slots of a layer. "
        f"Rows add up to 100; an even router gives {100 * even:.0f}."
    )
    # One scale for all maps; a router that is nearly even stays pale.
    full = max([2 * even, *(share for layer in layers for share in layer)])
    maps = [heat_map(kind, load[kind], data.experts, min(full, 1.0)) for kind in sorted(load, key=_place) if load[kind]]
    return [tag("p", lead, class_="lead"), tag("div", maps, class_="maps")]


def _development(curve: Curve, names: list[str], number: int) -> Child:
    history = curve.routing
    if not history.bins:
        return None
    layers, width = history.shape
    names = [names[e] if e < len(names) else f"expert {e}" for e in range(width)]
    spans = [(b.first, b.last) for b in history.bins]
    per_expert = width <= MAX_EXPERTS and layers <= MAX_LAYERS
    kinds: list[str | None] = [None, *sorted(history.kinds(), key=_place)] if per_expert else []
    strips: list[Html] = []
    for index, kind in enumerate(kinds):
        shares = history.shares(kind)
        full = min(1.0, max(2 / width, float(np.nanmax(shares))))
        colour = colour_of(kind or "all")
        figures = [
            heat_strips(
                f"layer {layer + 1}", names, shares[:, layer].T, spans, full, f"of {kind or 'all'} tokens", colour
            )
            for layer in range(layers)
        ]
        strips.append(
            tag("div", _scale(full, colour), tag("div", figures, class_="strips"), class_=f"of-kind of-{index}")
        )
    choice = [
        tag(
            "label",
            tag("input", type="radio", name=f"kind-{number}", class_=f"pick-{index}", checked=index == 0),
            kind or "all tokens",
        )
        for index, kind in enumerate(kinds)
    ]
    if not per_expert:
        rows = history.means("busiest").T
        labels = [f"layer {layer + 1}" for layer in range(layers)]
        full = 1.0
        figure = heat_strips("busiest expert", labels, rows, spans, full, "of first choices", "c-accent")
        strips = [tag("div", _scale(full, "c-accent"), tag("div", figure, class_="strips wide"))]
    step = "each column is a step" if history.width == 1 else f"each column is the mean of {history.width} steps"
    what = "the share of a layer's routed slots that each expert gets" if per_expert else "the busiest expert's share"
    heading = tag("h3", f"While training {curve.run}", tag("span", f"{what}; {step}", class_="muted"))
    return tag(
        "div",
        heading,
        tag("fieldset", tag("legend", "Tokens"), choice, class_="choice") if choice else None,
        strips,
        tag("div", _router_charts(curve, width), class_="charts pair"),
        class_="development",
    )


def _router_charts(curve: Curve, width: int) -> list[Html]:
    history = curve.routing
    middles, (layers, _) = history.middles(), history.shape
    charts = []
    top = math.log(width)
    for name, title, high, mark in (
        ("entropy", "router entropy, in nats", top, (top, f"undecided: log {width}")),
        ("busiest", "share of the busiest expert", 1.0, (1 / width, f"even: 1/{width}")),
    ):
        values = history.means(name)
        if not np.isfinite(values).any():
            continue
        shown = (
            range(layers)
            if layers <= MAX_LAYERS
            else sorted({0, layers // 4, layers // 2, 3 * layers // 4, layers - 1})
        )
        series = [
            Series(f"layer {i + 1}", values[:, i], f"--tone:{100 * n / max(len(shown) - 1, 1):.0f}%", "c-tone")
            for n, i in enumerate(shown)
        ]
        charts.append(lines_chart(f"{curve.run}: {title}", middles, series, (0.0, max(high, 1e-9)), mark))
    return charts


def validation_charts(data: RunData) -> list[Html]:
    """The validation loss of each run that had one, a line per modality group."""
    charts = []
    for curve in data.curves:
        if not curve.validations:
            continue
        steps = [step for step, _ in curve.validations]
        groups = sorted({group for _, losses in curve.validations for group in losses}, key=_place)
        table = np.array([[losses.get(group, math.nan) for group in groups] for _, losses in curve.validations])
        if not np.isfinite(table).any():
            continue
        # Mixed groups have the first one's colour, dashed.
        series = [
            Series(group, table[:, i], "stroke-dasharray:6 4" if "+" in group else None, colour_of(group.split("+")[0]))
            for i, group in enumerate(groups)
        ]
        high = float(table[np.isfinite(table)].max())
        charts.append(lines_chart(f"{curve.run}: validation loss", steps, series, (0.0, max(high, 1e-9)), None))
    return charts


def _scale(full: float, colour: str) -> Html:
    """The legend of the strips' colours."""
    bar = tag("span", class_=f"gradient {colour}")
    return tag("p", "0 %", bar, f"{100 * full:.0f} %", class_="legend scale", aria_hidden="true")


def _place(kind: str) -> tuple[int, str]:
    first = kind.split("+")[0]
    return (_ORDER.index(first) if first in _ORDER else len(_ORDER)), kind
