"""The parts of the page that are made of the run's numbers."""

from __future__ import annotations

from typing import Any

from unimoe_ray.report.experts import validation_charts
from unimoe_ray.report.html import Child, Html, missing, tag
from unimoe_ray.report.plots import accuracy_bar, colour_of, loss_chart, percent, wilson
from unimoe_ray.report.read import Curve, RunData
from unimoe_ray.report.words import count, date, duration, short


def headline(data: RunData) -> list[Html | None]:
    """The numbers of the run in one glance, and what identifies it."""
    evaluation, curves = data.evaluation or {}, data.curves
    tiles: list[Html] = []
    tasks = evaluation.get("tasks") or {}
    if tasks:
        mean = sum(task["accuracy"] for task in tasks.values()) / len(tasks)
        answers = sum(task["n"] for task in tasks.values())
        tiles.append(_tile(percent(mean), f"mean accuracy of {count(len(tasks), 'task')}, {answers:,} answers"))
    if curves:
        steps, tokens = sum(len(c.steps) for c in curves), sum(sum(c.tokens) for c in curves)
        tiles.append(_tile(duration(_training_seconds(curves)), f"of training, {count(len(curves), 'run')}"))
        tiles.append(_tile(f"{steps:,}", f"optimizer steps, {short(tokens)} tokens"))
    parameters = _parameters(evaluation.get("parameters") or data.config.get("parameters"))
    if parameters:
        tiles.append(parameters)
    facts: list[tuple[str, Child]] = []
    if times := [curve.times[-1] for curve in curves if curve.times[-1] > 0]:
        facts.append(("trained", date(max(times))))
    if isinstance(seconds := evaluation.get("seconds"), int | float):
        # An evaluation that was repeated on its own has its own time only.
        facts.append(("whole run" if seconds >= _training_seconds(curves) else "evaluation", duration(seconds)))
    for key, value in (("seed", evaluation.get("seed", data.config.get("seed"))), ("suite", evaluation.get("suite"))):
        if value is not None:
            text = str(value)
            facts.append((key, tag("code", text if len(text) <= 16 else text[:16] + "…", title=text)))
    towers = evaluation.get("towers")
    random_towers: list[str] = []
    if isinstance(towers, dict) and towers:
        random_towers = [tower for tower, kind in towers.items() if kind != "pretrained"]
        facts.append(
            ("towers", [tag("span", f"{t}: {k}", class_=f"badge {_kind(k)} {colour_of(t)}") for t, k in towers.items()])
        )
    warning = None
    if random_towers:
        text = f"These towers have random weights, not pretrained ones: {', '.join(random_towers)}."
        warning = tag("p", text, class_="notice")
    return [
        tag("div", tiles, class_="tiles") if tiles else None,
        tag("dl", [tag("div", tag("dt", key), tag("dd", value)) for key, value in facts], class_="facts")
        if facts
        else None,
        warning,
    ]


def _kind(tower: Any) -> str:
    return "pretrained" if tower == "pretrained" else "random"


def _tile(value: str, label: str) -> Html:
    return tag("div", tag("strong", value, class_="num"), tag("span", label), class_="tile")


def _parameters(value: Any) -> Html | None:
    """``parameters`` is a number, or {"total": n, "active": n, ...}."""
    if isinstance(value, int | float):
        return _tile(short(value), "parameters")
    if isinstance(value, dict) and isinstance(value.get("total"), int | float):
        rest = ", ".join(f"{short(n)} {key}" for key, n in value.items() if key != "total" and isinstance(n, int))
        return _tile(short(value["total"]), f"parameters{', ' + rest if rest else ''}")
    return None


def accuracy(data: RunData) -> Child:
    """The table of held-out tasks."""
    if data.evaluation is None:
        return missing("No evaluation yet: run", f"unimoe eval {data.folder}")
    rows = []
    for task, score in data.evaluation["tasks"].items():
        low, high = wilson(score["accuracy"], score["n"])
        rows.append(
            tag(
                "tr",
                tag("th", tag("a", task, href=f"#task-{task}") if data.samples else task, scope="row"),
                tag("td", percent(score["accuracy"]), class_="num main"),
                tag("td", f"{100 * low:.1f} – {100 * high:.1f}", class_="num muted"),
                tag("td", accuracy_bar(score["accuracy"], score["majority"], score["n"]), class_="wide"),
                tag("td", percent(score["majority"]), class_="num muted"),
                tag("td", f"{score['n']:,}", class_="num muted"),
            )
        )
    columns = (
        ("task", None),
        ("accuracy", "num"),
        ("95 % interval", "num"),
        ("", "wide"),
        ("majority", "num"),
        ("answers", "num"),
    )
    head = tag("tr", [tag("th", title, scope="col", class_=kind) for title, kind in columns])
    return [
        tag("p", "Held-out questions, answered greedily, counted as right only if the whole answer is.", class_="lead"),
        tag("div", tag("table", tag("thead", head), tag("tbody", rows), class_="scores"), class_="scroll"),
        tag(
            "p",
            tag("span", class_="key whisker"),
            "95 % interval (Wilson) ",
            tag("span", class_="key majority"),
            "always giving the most frequent answer",
            class_="legend",
        ),
    ]


def losses(data: RunData) -> Child:
    """A chart per training run."""
    charts = [chart for curve in data.curves if (chart := loss_chart(curve))]
    if not charts:
        return missing("No training steps yet: run", "unimoe train all")
    choice = [
        tag("label", tag("input", type="radio", name="scale", id=f"scale-{key}", checked=key == "linear"), key)
        for key in ("linear", "log")
    ]
    return [
        tag(
            "p",
            "Loss per answer token by optimizer step: each step faint, smoothed over a twentieth of the run.",
            class_="lead",
        ),
        tag("fieldset", tag("legend", "Scale"), choice, class_="choice"),
        tag("div", charts, class_="charts"),
        _validations(data),
    ]


def _validations(data: RunData) -> Child:
    if not (charts := validation_charts(data)):
        return None
    what = "loss on the same few held-out samples, by the media that they have"
    return [
        tag("h3", "Validation while training", tag("span", what, class_="muted")),
        tag("div", charts, class_="charts pair"),
    ]


def stages(data: RunData) -> Child:
    """A row per training run."""
    if not data.curves:
        return missing("No training steps yet.")
    columns = ("stage", "run", "steps", "time", "tokens/s", "tokens", "samples", "workers")
    head = tag("tr", [tag("th", c, scope="col", class_=None if i < 2 else "num") for i, c in enumerate(columns)])
    rows, previous = [], None
    for curve in data.curves:
        seconds, tokens = sum(curve.seconds), sum(curve.tokens)
        steps = (
            f"{len(curve.steps):,}" if curve.steps[-1] >= curve.planned else f"{curve.steps[-1]:,} of {curve.planned:,}"
        )
        worlds = "–".join(map(str, sorted({min(curve.worlds), max(curve.worlds)})))
        cells = (
            steps,
            duration(seconds),
            f"{tokens / seconds:,.0f}" if seconds else "–",
            short(tokens),
            f"{sum(curve.samples):,}",
            worlds,
        )
        rows.append(
            tag(
                "tr",
                tag("th", curve.stage if curve.stage != previous else "", scope="row"),
                tag("td", tag("span", class_="dot"), curve.run, class_=colour_of(curve.run)),
                [tag("td", cell, class_="num") for cell in cells],
            )
        )
        previous = curve.stage
    lead = "Time is the sum of the steps; runs of one stage may have trained side by side."
    table = tag("table", tag("thead", head), tag("tbody", rows), class_="stages")
    return [tag("p", lead, class_="lead"), tag("div", table, class_="scroll")]


def quarantine(data: RunData) -> Child:
    """How many records were left out, and why."""
    total = sum(data.quarantine.values())
    if not total:
        return tag("p", "No record was put into quarantine.", class_="lead")
    rows = [
        tag("tr", tag("td", reason), tag("td", f"{number:,}", class_="num"))
        for reason, number in data.quarantine.most_common(20)
    ]
    if len(data.quarantine) > 20:
        rows.append(tag("tr", tag("td", f"and {len(data.quarantine) - 20:,} more reasons", class_="muted"), tag("td")))
    return [
        tag("p", f"{count(total, 'record')} in quarantine: not trained on, not evaluated.", class_="lead"),
        tag("details", tag("summary", "Reasons"), tag("table", tag("tbody", rows))),
    ]


def _training_seconds(curves: list[Curve]) -> float:
    """Length of the time in which some run trained: runs side by side count once."""
    spans = sorted((c.times[0] - c.seconds[0], c.times[-1]) for c in curves if c.times[0] > 0)
    if not spans:
        return sum(sum(c.seconds) for c in curves)
    total, reached = 0.0, spans[0][0]
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
