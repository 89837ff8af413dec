"""The page of an experiment: arms over seeds, the paper's claims with a verdict each, what it cost and what it does not
show. One file, no network."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from unimoe_ray import __version__
from unimoe_ray.report.html import Child, Html, missing, tag
from unimoe_ray.report.intervals import Row, intervals_chart
from unimoe_ray.report.lines import Series, lines_chart
from unimoe_ray.report.words import count, date, duration, short

PAPER = "Uni-MoE (arXiv 2405.11273)"
Found = Mapping[str, Any]
SPECIALIST = "specialist-"  # such arms know one modality alone: a mean over all tasks says nothing of them
COLOURS = ("c-accent", "c-speech", "c-audio", "c-answer")
CHANCE = 0.05  # of an interval that misses the truth


def write_ablation_page(path: Path, name: str, found: Found) -> None:
    """``found``: as ``experiments.results.collect`` has it."""
    sections = [
        ("claims", "Claims of the paper", _claims(found)),
        ("accuracy", "Accuracy by arm", _accuracies(found)),
        ("arms", "Arms", _arms(found)),
        ("loss", "Loss of stage 3", _losses(found)),
        ("costs", "Costs", _costs(found)),
        ("limits", "What is not shown", _limits(found)),
    ]
    links = tag("nav", [tag("a", title, href=f"#{key}") for key, title, _ in sections], aria_label="Contents")
    parts = [tag("section", tag("h2", title), content, id=key) for key, title, content in sections]
    made = f"Made by unimoe_ray {__version__} on {date(time.time())} by "
    body = [
        tag("header", tag("p", "Uni-MoE ablations", class_="kicker"), tag("h1", name), _headline(found)),
        links,
        tag("main", parts),
        tag("footer", made, tag("code", "python -m jobs.ablate --report"), "."),
        tag("script", Html(_asset("report.js"))),
    ]
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{name}: Uni-MoE ablations"),
        tag("style", Html(_asset("report.css"))),
    ]
    page = "<!doctype html>\n" + tag("html", tag("head", head), tag("body", body), lang="en") + "\n"
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)


def amount(found: Found, scale: float = 1.0, digits: int = 1, signed: bool = False) -> str:
    """A mean with its interval: ``90.1 (88.2 to 92.0)``; of a single seed without."""
    if not _known(found["mean"]):
        return "–"
    ends = [found[key] for key in ("mean", "low", "high") if _known(found[key])]
    mean, *interval = (f"{round(scale * end, digits) + 0.0:{'+' if signed else ''}.{digits}f}" for end in ends)
    return f"{mean} ({' to '.join(interval)})" if interval else mean


def _headline(found: Found) -> list[Html | None]:
    verdicts = [claim["verdict"] for claim in found["claims"]]
    whole = found["finished"] == found["planned"]
    seeds = [len(arm["by seed"]) for arm in found["arms"].values()]
    tiles = [
        (f"{found['finished']} of {found['planned']}", "planned runs are here"),
        (
            str(min(seeds)) if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}",
            f"seeds of each of {count(len(seeds), 'arm')}",
        ),
        *((str(verdicts.count(kind)), f"claims {kind}") for kind in ("seen", "not seen", "undecided")),
    ]
    split = "development split" if found["split"] == "dev" else "held-out split"
    questions = sum(found["questions"].values())
    lead = (
        f"Do the claims of {PAPER} hold for a small model on small tasks? Every arm starts from the same stages 0 to 2 "
        f"of its seed and differs in stage 3 alone. Accuracy is the mean over {count(len(found['questions']), 'task')} "
        f"({questions:,} questions of the {split}), an answer counted as right only if all of it is."
    )
    warning = None
    if not whole:
        text = f"Partial results: {found['finished']} of {found['planned']} planned runs have finished. "
        warning = tag("p", text, "Figures are of those alone, and may change.", class_="notice")
    return [
        tag("p", lead, class_="lead"),
        tag("div", [tag("div", tag("strong", a), tag("span", b), class_="tile") for a, b in tiles], class_="tiles"),
        warning,
    ]


def _claims(found: Found) -> Child:
    rows = []
    for claim in found["claims"]:
        scale, digits = (100, 1) if claim["unit"] == "points" else (1, 0)
        kind = {"seen": "good", "not seen": "bad"}.get(claim["verdict"], "open")
        rows.append(
            tag(
                "tr",
                tag("th", claim["text"], scope="row"),
                tag("td", tag("span", claim["verdict"], class_=f"verdict {kind}")),
                tag("td", f"{amount(claim, scale, digits, signed=True)} {claim['unit']}", class_="num"),
                tag("td", claim["seeds"], class_="num muted"),
                tag("td", _paper(claim["paper"]), class_="muted"),
            )
        )
    for claim in found["not judged"]:
        missed = [arm for arm in claim["arms"] if not found["arms"].get(arm, {}).get("by seed")]
        why = f"no run of {', '.join(missed)}" if missed else "no seed has all of its arms"
        cells = [tag("td", why, colspan=3, class_="muted"), tag("td", _paper(claim["paper"]), class_="muted")]
        rows.append(tag("tr", tag("th", claim["text"], scope="row"), cells))
    lead = (
        "A verdict compares two arms seed by seed: the mean difference with Student's 95 % interval over seeds. Seen: "
        "the interval lies above 0, on the side that the paper claims. Not seen: below 0. Undecided: 0 is "
        "inside, or there "
        "is one seed only."
    )
    wrong = CHANCE * len(found["claims"])
    return [
        tag("p", lead, class_="lead"),
        _table(("claim", "verdict", "difference", "seeds", "the paper's own difference"), rows, numbers=(2, 3)),
        _differences(found),
        tag(
            "p",
            f"Of {count(len(found['claims']), 'interval')} at 95 %, {wrong:.1f} miss the truth by chance alone; "
            f"none is "
            "corrected for that. The paper's differences are of single runs of a 7B model on its own benchmarks; "
            "where one is below 0, the mean of the paper's own table is against the claim.",
            class_="legend",
        ),
    ]


def _differences(found: Found) -> Child:
    rows = []
    for claim in found["claims"]:
        if claim["unit"] == "points":
            title = f"{claim['text']}: {amount(claim, 100, signed=True)} points"
            rows.append(Row(claim["claim"], title, *_ends(claim, 100), (), claim["paper"]["difference"]))
    if not rows:
        return None
    # A few wide intervals of few seeds would leave no room for the others: they are cut off.
    reach = 1.3 * max(2.0, *(abs(value) for row in rows for value in (row.mean, row.other or 0.0)))
    legend = (
        "In points, as in the table: the bar is the mean, the line its interval (cut off at the edges), the diamond "
        "the paper's own difference. Right of 0, a claim holds."
    )
    chart = intervals_chart("Differences by claim", rows, (-reach, reach), "", left=150, zero=True)
    return [chart, tag("p", legend, class_="legend")]


def _ends(found: Found, scale: float) -> tuple[float, float, float]:
    """Mean, low and high; nan for those that are not known."""
    return tuple(scale * found[key] if _known(found[key]) else np.nan for key in ("mean", "low", "high"))


def _paper(paper: Mapping[str, Any]) -> str:
    if paper["difference"] is None:
        return paper["where"]
    return f"{paper['difference']:+.1f} points: {paper['where']}"


def _accuracies(found: Found) -> Child:
    arms = [(n, arm) for n, arm in found["arms"].items() if arm["by seed"] and not n.startswith(SPECIALIST)]
    if not arms:
        return missing("No run has finished yet.")
    rows = []
    for name, arm in arms:
        mean, low, high = _ends(arm["figures"]["accuracy"], 100)
        title = f"{name}, {arm['about']}: {amount(arm['figures']['accuracy'], 100)} %"
        rows.append(Row(name, title, mean, low, high, [100 * value for value in arm["by seed"].values()]))
    dots = [value for row in rows for value in row.dots]
    ends = [end for row in rows for end in (row.low, row.high) if np.isfinite(end)]
    low, high = min(dots + ends), max(dots + ends)
    chart = intervals_chart("Accuracy by arm", rows, (max(0.0, low - 1), min(100.0, high + 1)), " %", left=168)
    legend = "Each dot is a seed, the bar their mean, the line its 95 % interval over seeds. Specialists are left out: "
    legend += "they are asked about all modalities and know one."
    return [chart, tag("p", legend, class_="legend")]


def _arms(found: Found) -> Child:
    columns = ("arm", "", "accuracy, %", "worst drop, points", "steps to 90 %", "loss variance, 1/1000", "seeds")
    rows = []
    for name, arm in found["arms"].items():
        figures = arm["figures"]
        cells = (
            amount(figures["accuracy"], 100),
            amount(figures["worst drop"], 100),
            amount(figures["steps to 90 %"], 1, 0),
            amount(figures["loss variance"], 1000, 2),
            len(arm["by seed"]),
        )
        row = [tag("td", arm["about"], class_="muted"), [tag("td", cell, class_="num") for cell in cells]]
        rows.append(tag("tr", tag("th", name, scope="row"), row))
    groups = [name for name in next(iter(found["arms"].values()))["figures"] if name not in _OVERALL]
    by_group = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            [tag("td", amount(arm["figures"][group], 100), class_="num") for group in groups],
        )
        for name, arm in found["arms"].items()
        if arm["by seed"] and all(group in arm["figures"] for group in groups)
    ]
    lead = (
        "Means over seeds with 95 % intervals. Worst drop: how far the arm falls behind the specialist of the modality "
        "that it is worst at, a dense model trained on that modality alone; the paper's performance bias. Steps to "
        "90 %: until nine tenths of the fall of its own smoothed loss are done; of little meaning for an arm that "
        "starts near its end. Loss variance: of the last fifth of the steps about their trend."
    )
    return [
        tag("p", lead, class_="lead"),
        _table(columns, rows, numbers=range(2, 7)),
        [tag("h3", "Accuracy by modality, %"), _table(("arm", *groups), by_group, numbers=range(1, 1 + len(groups)))]
        if groups and by_group
        else None,
    ]


_OVERALL = ("accuracy", "worst drop", "mean drop", "steps to 90 %", "loss variance")


def _losses(found: Found) -> Child:
    charts = []
    for title, names in found["families"].items():
        curves = {label: found["arms"][arm]["curve"] for arm, label in names.items() if arm in found["arms"]}
        curves = {label: curve for label, curve in curves.items() if len(curve) > 1}
        if not curves:
            continue
        steps = sorted({step for curve in curves.values() for step, _ in curve})
        lines = []
        for number, (label, curve) in enumerate(curves.items()):
            known, losses = zip(*curve, strict=True)
            values = np.interp(steps, known, losses, right=np.nan)
            lines.append(Series(label, values, None, COLOURS[number % len(COLOURS)]))
        high = max(float(np.nanmax(line.values)) for line in lines)
        charts.append(lines_chart(title, steps, lines, (0.0, high), None))
    if not charts:
        return missing("No losses yet.")
    lead = "Loss per answer token by optimizer step, smoothed, mean over seeds. An arm may be in several pictures."
    return [tag("p", lead, class_="lead"), tag("div", charts, class_="charts pair")]


def _costs(found: Found) -> Child:
    known = {name: arm["cost"] for name, arm in found["arms"].items() if arm["by seed"]}
    if not known:
        return missing("No run has finished yet.")
    columns = ("arm", "parameters", "active", "FLOPs of a token", "steps", "training time", "a step")
    rows = []
    for name, cost in known.items():
        seconds = cost["seconds"]
        cells = (
            short(cost["parameters"]) if cost["parameters"] else "–",
            short(cost["active"]) if cost["active"] else "–",
            short(2 * cost["active"]) if cost["active"] else "–",
            f"{cost['steps']:,}",
            duration(seconds) if seconds else "–",
            f"{seconds / cost['steps']:.2f} s" if seconds else "–",
        )
        rows.append(tag("tr", tag("th", name, scope="row"), [tag("td", cell, class_="num") for cell in cells]))
    lead = (
        "Of the language model: all parameters, those that one token passes, and twice as many floating point "
        "operations "
        "for one token forwards (attention scores left out). Steps and time are of stage 3, time the median over "
        "seeds of "
        "runs that shared the machine. The arms that start from experts had stage 2 before, which the others skip."
    )
    return [tag("p", lead, class_="lead"), _table(columns, rows, numbers=range(1, 7))]


def _limits(found: Found) -> Child:
    sizes = [arm["cost"]["parameters"] for arm in found["arms"].values() if arm["cost"]["parameters"]]
    scale = f"at most {short(max(sizes))} parameters" if sizes else "a few million parameters"
    smallest = min((n for n in found["questions"].values()), default=0)
    points = [
        f"Scale: a language model of {scale}, trained for minutes; the paper's has 7 billion. That an effect is "
        f"missing "
        "here says little about its size there, and the other way round.",
        f"Seeds: {len(found['seeds'])} planned. Seeds differ in weights, order and noise; the task suite is the "
        f"same for "
        "all. With few seeds an interval is wide, and undecided means no more than that.",
        f"Tasks: synthetic pictures, sounds, speech and clips with answers of one to three words, {smallest} "
        f"questions or "
        "more of each. No benchmark of the paper, no free text, no long speech.",
        "Encoders: small frozen ones, not CLIP, Whisper-small and BEATs; videos keep their frames, where the paper "
        "averages them.",
        "Honest yes and no: most yes/no questions about pictures name what is not there; always assuming so "
        "scores high.",
        "Settings: learning rates and steps were chosen for the default (4 experts, top-2, all layers), not for "
        "each arm. "
        "Another arm might do better with its own.",
        "Equal FLOPs: dense and top-1 arms have equal active parameters but for the router, top-2 arms have "
        "more. In the paper, too, most "
        "mixtures compute more per token than the dense models beside them.",
        "Experts: three of stage 2 and the untouched base; other groupings were not tried, nor were 6 experts.",
    ]
    if found["split"] == "dev":
        points.append("The held-out split: these figures are of the development split, on which settings were chosen.")
    if found["finished"] < found["planned"]:
        left = found["planned"] - found["finished"]
        points.append(f"The whole experiment: {count(left, 'planned run')} of {found['planned']} had not finished.")
    if found["not judged"]:
        points.append(f"{count(len(found['not judged']), 'claim')} could not be judged: arms are missing.")
    return tag("ul", [tag("li", point) for point in points], class_="points")


def _table(columns, rows: list[Html], numbers=()) -> Html:
    heads = [tag("th", name, scope="col", class_="num" if i in numbers else None) for i, name in enumerate(columns)]
    table = tag("table", tag("thead", tag("tr", heads)), tag("tbody", rows), class_="scores")
    return tag("div", table, class_="scroll")


def _known(value: float | None) -> bool:
    return value is not None and np.isfinite(value)


def _asset(name: str) -> str:
    return resources.files("unimoe_ray.report").joinpath(name).read_text(encoding="utf-8")
