"""When each run made headway and when it did not: starts, lost steps and failures over time, as inline SVG."""

from __future__ import annotations

from typing import Any

from unimoe_ray.report.html import Child, Html, tag
from unimoe_ray.report.plots import colour_of, linear_ticks, percent
from unimoe_ray.report.read import Curve, RunData
from unimoe_ray.report.words import count, duration

WIDTH, ROW, TOP, LEFT, RIGHT, AXIS = 960, 34, 6, 112, 12, 26
CAUSES = {
    "lost": "worker lost",
    "error": "error",
    "hang": "worker hung",
    "network": "connection lost",
    "resize": "resize",
    "preemption": "preemption",
    "rewind": "rewind",
    "driver": "driver stopped",
}


def timeline(data: RunData) -> Child:
    """A row per run, and a table of what it cost to go on."""
    rows = [(curve, [e for e in data.events if e["run"] == curve.run]) for curve in data.curves if curve.times[-1] > 0]
    rows = [(curve, events) for curve, events in rows if events]
    if not rows:
        return tag("p", "Nothing is written down of when workers started and stopped.", class_="missing")
    restarts = sum(curve.restarts for curve, _ in rows)
    lead = "Steps that count, over the time that a driver was there, are the goodput."
    if not restarts:
        lead = f"No worker was lost, and none came. {lead}"
    return [
        tag("p", lead, class_="lead"),
        tag("div", _drawn(rows), class_="scroll"),
        tag(
            "p",
            [(tag("span", class_=f"key time-{kind}"), text, " ") for kind, text in KINDS.items()],
            class_="legend",
        ),
        tag("div", _costs(rows), class_="scroll"),
        _stops(rows) if restarts else None,
    ]


KINDS = {"start": "starting", "steps": "steps", "gone": "steps that were lost", "stop": "a stop"}


def _drawn(rows: list[tuple[Curve, list[dict[str, Any]]]]) -> Html:
    begin = min(events[0]["time"] for _, events in rows)
    end = max(max(curve.times[-1], events[-1]["time"]) for curve, events in rows)
    scale = (WIDTH - LEFT - RIGHT) / max(end - begin, 1e-9)
    height = TOP + ROW * len(rows) + AXIS

    def x(time: float) -> float:
        return round(LEFT + (time - begin) * scale, 1)

    title = f"Timeline of {count(len(rows), 'run')} over {duration(end - begin)}"
    parts = [tag("title", title)]
    minutes = end - begin >= 180
    unit = 60 if minutes else 1
    for value in linear_ticks(0, max((end - begin) / unit, 1e-3), count=8):
        at = x(begin + value * unit)
        if at <= WIDTH - RIGHT:
            parts.append(tag("line", x1=at, x2=at, y1=TOP, y2=height - AXIS, class_="grid"))
            text = f"{value:g} {'min' if minutes else 's'}"
            parts.append(tag("text", text, x=at, y=height - 9, text_anchor="middle"))
    for row, (curve, events) in enumerate(rows):
        y = TOP + ROW * row
        parts.append(tag("text", curve.run, x=LEFT - 8, y=y + ROW / 2 + 4, text_anchor="end"))
        for kind, first, last, text in _spans(curve, events):
            if last > first:
                box = tag(
                    "rect",
                    x=x(first),
                    y=y + 5,
                    width=max(0.5, round(x(last) - x(first), 1)),
                    height=ROW - 10,
                    class_=f"time-{kind}",
                )
                parts.append(tag("g", tag("title", text), box))
        for event in events:
            if event["event"] == "stop":
                at = x(event["time"])
                mark = tag("line", x1=at, x2=at, y1=y + 1, y2=y + ROW - 1, class_="time-stop")
                parts.append(tag("g", tag("title", str(event.get("text", "stop"))), mark))
    return tag(
        "svg",
        parts,
        viewBox=f"0 0 {WIDTH} {height}",
        role="img",
        aria_label=title,
        class_="timeline",
    )


def _spans(curve: Curve, events: list[dict[str, Any]]) -> list[tuple[str, float, float, str]]:
    """(kind, first second, last second, text): workers starting; steps that count; steps that were lost."""
    spans = []
    starts = [e["time"] for e in events if e["event"] == "start"]
    for number, start in enumerate(starts):
        later = starts[number + 1] if number + 1 < len(starts) else float("inf")
        inside = [event for event in events if start <= event["time"] < later]
        stop = next((e["time"] for e in inside if e["event"] == "stop"), None)
        resume = next((e["time"] for e in inside if e["event"] == "resume"), start if stop is None else stop)
        world = next((e.get("workers") for e in inside if e["event"] == "start"), None)
        workers = count(world, "worker") if isinstance(world, int) else "workers"
        times = [(step, time) for step, time in zip(curve.steps, curve.times, strict=True) if start <= time < later]
        counted = times[-1][1] if times else resume
        spans.append(("start", start, resume, f"{workers}: starting, {duration(resume - start)}"))
        if times:
            spans.append(("steps", resume, counted, f"{workers}: steps {times[0][0]} to {times[-1][0]}"))
        if stop is not None and stop > counted:
            spans.append(("gone", counted, stop, f"lost, {duration(stop - counted)}"))
    return spans


def _costs(rows: list[tuple[Curve, list[dict[str, Any]]]]) -> Html:
    columns = ["run", "goodput", "restarts", "lost steps", "mean time to recover", "pauses for checkpoints"]
    head = tag("tr", [tag("th", c, scope="col", class_=None if i == 0 else "num") for i, c in enumerate(columns)])
    body = []
    for curve, events in rows:
        recoveries = [float(event["seconds"]) for event in events if event["event"] == "recovered"]
        cells = [
            percent(curve.goodput) if curve.goodput is not None else "–",
            f"{curve.restarts:,}",
            f"{curve.lost_steps:,}",
            duration(sum(recoveries) / len(recoveries)) if recoveries else "–",
            duration(curve.pauses) if curve.pauses else "–",
        ]
        name = tag("td", tag("span", class_="dot"), curve.run, class_=colour_of(curve.run))
        body.append(tag("tr", name, [tag("td", cell, class_="num") for cell in cells]))
    return tag("table", tag("thead", head), tag("tbody", body), class_="stages")


def _stops(rows: list[tuple[Curve, list[dict[str, Any]]]]) -> Html:
    items = [
        tag("li", tag("strong", CAUSES.get(event.get("cause"), "stop")), f" {curve.run}: ", str(event.get("text", "")))
        for curve, events in rows
        for event in events
        if event["event"] == "stop"
    ]
    return tag("details", tag("summary", f"{count(len(items), 'stop')} of workers, and why"), tag("ul", items))
