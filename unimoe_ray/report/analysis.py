"""What ``unimoe analyse`` found: soft tokens, specialisation, experts switched off, paths, new combinations of "
"media."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from unimoe_ray.report.html import Child, Html, missing, tag
from unimoe_ray.report.plots import accuracy_bar, colour_of, heat_map, percent, wilson
from unimoe_ray.report.read import RunData

SIDE, EDGE = 420, 14
LOST = 0.2  # a drop of so much has the full colour


def analysis(data: RunData) -> Child:
    found = data.analysis
    if found is None:
        return missing("No analysis yet: run", f"unimoe analyse {data.folder}")
    slots = [str(slot) for slot in found.get("experts") or []]
    names = [f"{slot} {e + 1}" if slots.count(slot) > 1 else slot for e, slot in enumerate(slots)]
    parts: list[tuple[str, str, Callable[[dict[str, Any], list[str]], Child]]] = [
        ("soft_tokens", "Soft tokens beside text", _soft_tokens),
        ("routing", "Specialisation before and after stage 3", _specialisation),
        ("off", "Without one expert", _without),
        ("paths", "Paths of tokens", _paths),
        ("unseen", "Combinations that training did not have", _unseen),
    ]
    shown: list[Child] = [
        tag("p", f"On held-out questions, at most {found.get('samples')} of each task.", class_="lead")
    ]
    if (evaluated := (data.evaluation or {}).get("model")) and evaluated != found.get("model"):
        shown.append(tag("p", "This analysis is of an earlier model than the accuracies above.", class_="notice"))
    for key, title, show in parts:
        if not found.get(key):
            continue
        try:
            content = show(found[key], names)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            content = missing("analysis.json is damaged here.")
        shown.append([tag("h3", title), content])
    return shown


def _soft_tokens(found: dict[str, Any], _: list[str]) -> Child:
    rows = []
    for kind, about in found.items():
        words = ", ".join(f"{word or '␣'} {100 * share:.0f} %" for word, share in about.get("words", []))
        cells = (
            f"{about['tokens']:,}",
            f"{about['norm']:.3g} ± {100 * about['norm_sd'] / about['norm']:.0f} %",
            f"{about['spread']:.2f}",
            f"{about['alike']:.2f}",
            f"{about['nearest']:.2f}" if "nearest" in about else "–",
        )
        rows.append(
            tag(
                "tr",
                tag("th", tag("span", class_="dot"), kind, scope="row", class_=colour_of(kind)),
                [tag("td", cell, class_="num") for cell in cells],
                tag("td", words, class_="muted"),
            )
        )
    lead = (
        "What the connectors give the language model, beside the text tokens of the same questions. Length: mean and "
        "standard deviation. Spread: distance from their common mean over length, 0 if all are one vector, 1 if they "
        "have no common part. Alike: mean cosine of two of them. Nearest: mean cosine with the nearest word."
    )
    columns = ("", "tokens", "length", "spread", "alike", "nearest", "words that are nearest most often")
    return [tag("p", lead, class_="lead"), _table(columns, rows, range(1, 6))]


def _specialisation(found: dict[str, Any], names: list[str]) -> Child:
    after, before = found["after"], found.get("before")
    rows = []
    for layer, (score, bits) in enumerate(zip(after["score"], after["bits"], strict=True)):
        earlier = before["score"][layer] if before else None
        cells = ("–" if earlier is None else f"{earlier:.3f}", f"{score:.3f}", f"{bits:.3f}")
        rows.append(tag("tr", tag("th", layer + 1, scope="row"), [tag("td", cell, class_="num") for cell in cells]))
    lead = (
        "How much a token's expert tells about its modality: mutual information over the most there can be, 0 if all "
        "modalities go to the experts alike, 1 if each keeps to its own. Before stage 3 the routers are random."
    )
    maps = []
    for title, part in (("Before stage 3", before), ("After stage 3", after)):
        if part:
            shares = {kind: [_shares(layer) for layer in layers] for kind, layers in part["routed"].items()}
            full = min(1.0, max(2 / max(len(names), 1), *(s for ls in shares.values() for layer in ls for s in layer)))
            drawn = [heat_map(kind, layers, names, full) for kind, layers in shares.items()]
            summary = tag("summary", f"{title}: per cent of a layer's slots by modality")
            maps.append(tag("details", summary, tag("div", drawn, class_="maps"), class_="wide"))
    columns = ("mixture layer", "before", "after", "bits after")
    return [tag("p", lead, class_="lead"), _table(columns, rows, range(1, 4), "narrow"), maps]


def _shares(counts: Sequence[int]) -> list[float]:
    return [count / max(sum(counts), 1) for count in counts]


def _without(found: dict[str, Any], names: list[str]) -> Child:
    rows = []
    for task, whole in found["all"].items():
        off = [without[task] for without in found["without"]]
        cells = [tag("td", f"{100 * whole:.0f}", class_="plain")]
        for share in off:
            depth = min(max(whole - share, 0.0) / LOST, 1.0)
            ink = "strong" if depth > 0.8 else "middling" if depth > 0.65 else None
            cells.append(tag("td", f"{100 * share:.0f}", style=f"--depth:{100 * depth:.0f}%", class_=ink))
        count = tag("td", found["questions"][task], class_="plain muted")
        rows.append(tag("tr", tag("th", task, scope="row"), cells, count))
    heads = ["switched off:", "none", *names, "questions"]
    head = tag("tr", [tag("th", name, scope="col") for name in heads])
    lead = (
        "Accuracy in per cent when one expert is taken out of every mixture and its tokens go to the best of the "
        "others. "
        f"The colour is what is lost: full from {100 * LOST:.0f} points on. Few questions: differences of some points "
        "are noise."
    )
    table = tag("table", tag("thead", head), tag("tbody", rows), aria_label="Accuracy without one expert")
    return [tag("p", lead, class_="lead"), tag("figure", tag("div", table, class_="scroll"), class_="map off c-answer")]


def _paths(found: dict[str, Any], names: list[str]) -> Child:
    points = found["points"]
    xs, ys = ([point[axis] for part in points.values() for point in part] for axis in (0, 1))
    dots = [
        tag(
            "g",
            tag("title", kind),
            [
                tag("circle", cx=_place(x, xs, False), cy=_place(y, ys, True), r=2.6, class_="path-point")
                for x, y in part
            ],
            class_=colour_of(kind),
        )
        for kind, part in points.items()
    ]
    drawn = tag("svg", dots, viewBox=f"0 0 {SIDE} {SIDE}", role="img", aria_label="Paths of tokens on a plane")
    keys = [tag("span", tag("span", class_="dot"), kind, class_=f"path-key {colour_of(kind)}") for kind in points]
    first, second = (percent(share, 0) for share in found["explained"])
    lead = (
        "A token's path is the weight of every expert in every layer. Each dot is a token, as many of each "
        "modality, on "
        f"the two directions in which paths differ most ({first} and {second} of the variance). The table has the most "
        "frequent sequences of first choices."
    )
    kinds = list(points)
    rows = [
        tag(
            "tr",
            tag("th", " → ".join(names[e] if e < len(names) else str(e) for e in entry["path"]), scope="row"),
            [tag("td", f"{100 * entry['shares'].get(kind, 0):.0f} %", class_="num") for kind in kinds],
        )
        for entry in found["common"]
    ]
    return [
        tag("p", lead, class_="lead"),
        tag(
            "div",
            tag("figure", tag("figcaption", keys), drawn, class_="paths"),
            _table(("path", *kinds), rows, range(1, 1 + len(kinds)), "narrow"),
            class_="charts pair",
        ),
    ]


def _place(value: float, values: Sequence[float], upwards: bool) -> float:
    low, high = min(values), max(values)
    share = (value - low) / (high - low) if high > low else 0.5
    return round(EDGE + (1 - share if upwards else share) * (SIDE - 2 * EDGE), 1)


def _unseen(found: dict[str, Any], _: list[str]) -> Child:
    rows = []
    for task, score in found.items():
        low, high = wilson(score["accuracy"], score["n"])
        alone = f"{percent(score['alone'])} ({score['alone_task']})" if "alone" in score else "–"
        rows.append(
            tag(
                "tr",
                tag("th", task, scope="row"),
                tag("td", score["media"], class_="muted"),
                tag("td", score["question"], class_="muted"),
                tag("td", percent(score["accuracy"]), class_="num main"),
                tag("td", f"{100 * low:.1f} – {100 * high:.1f}", class_="num muted"),
                tag("td", accuracy_bar(score["accuracy"], score["majority"], score["n"]), class_="wide"),
                tag("td", alone, class_="num muted"),
                tag("td", f"{score['n']:,}", class_="num muted"),
            )
        )
    lead = (
        "Held-out files put together as no training sample has them. Alone: the same files asked about one at a "
        "time, as "
        "in training. In training, an image comes with speech and a video with its sound, never otherwise. What "
        "image_and_sound asks is new, too."
    )
    columns = ("task", "media", "for example", "accuracy", "95 % interval", "", "alone", "answers")
    return [tag("p", lead, class_="lead"), _table(columns, rows, (3, 4, 6, 7), "scores unseen")]


def _table(columns: Sequence[str], rows: list[Html], numbers: Sequence[int], kind: str = "scores") -> Html:
    heads = [tag("th", name, scope="col", class_="num" if i in numbers else None) for i, name in enumerate(columns)]
    return tag("div", tag("table", tag("thead", tag("tr", heads)), tag("tbody", rows), class_=kind), class_="scroll")
