"""The page of a data set that was looked over: counts, token lengths, repeats, what is broken, examples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from unimoe_ray.report.html import Child, Html, tag

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 720, 220, 52, 30, 12
BARS = 48


def write_check_page(path: Path, name: str, found: Mapping[str, Any]) -> None:
    """``found``: as ``check.json`` has it (records, samples, groups, media, lengths, repeats, reasons, examples)."""
    sections = [
        ("Samples", _samples(found)),
        ("Token lengths", _lengths(found)),
        ("Repeats", _repeats(found)),
        ("Not usable", _bad(found)),
        ("Examples", _examples(found["examples"])),
    ]
    body = [
        tag("header", tag("p", "Uni-MoE data check", class_="kicker"), tag("h1", name), _tiles(found)),
        tag("main", [tag("section", tag("h2", title), content) for title, content in sections]),
    ]
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{name}: data check"),
        tag("style", Html(resources.files("unimoe_ray.report").joinpath("report.css").read_text(encoding="utf-8"))),
    ]
    page = "<!doctype html>\n" + tag("html", tag("head", head), tag("body", body), lang="en") + "\n"
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)


def histogram(lengths: Mapping[int, int], bars: int = BARS) -> list[tuple[int, int, int]]:
    """(from, to, samples) of at most ``bars`` bins of equal width over the lengths there are, both ends included."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    width = max(1, math.ceil((high - low + 1) / bars))
    counts = [0] * ((high - low) // width + 1)
    for length, samples in lengths.items():
        counts[(length - low) // width] += samples
    return [(low + i * width, low + (i + 1) * width - 1, count) for i, count in enumerate(counts)]


def quantile(lengths: Mapping[int, int], share: float) -> int:
    """The shortest length that at least this share of the samples does not exceed; 0 without samples."""
    left = share * sum(lengths.values())
    for length in sorted(lengths):
        left -= lengths[length]
        if left <= 0:
            return length
    return 0


def _tiles(found: Mapping[str, Any]) -> Html:
    usable = sum(sum(tasks.values()) for tasks in found["samples"].values())
    tiles = [
        (f"{usable:,}", f"usable of {found['records']:,} records"),
        (f"{sum(found['media'].values()):,}", "media files"),
        (f"{found['bad']:,}", "records that can't be used"),
        (f"{found['repeated']:,}", "samples that repeat another one"),
    ]
    return tag(
        "div",
        [tag("div", tag("strong", big), tag("span", small), class_="tile") for big, small in tiles],
        class_="tiles",
    )


def _table(head: list[str], rows: list[list[Child]]) -> Html:
    def line(name: str, cells: list[Child]) -> Html:
        return tag("tr", [tag(name, cell, class_="num" if i else None) for i, cell in enumerate(cells)])

    body = tag("tbody", [line("td", row) for row in rows])
    return tag("div", tag("table", tag("thead", line("th", head)), body), class_="scroll")


def _samples(found: Mapping[str, Any]) -> list[Html]:
    splits = list(found["samples"])
    tasks = sorted({task for split in splits for task in found["samples"][split]})
    counts = [[task, *(f"{found['samples'][split].get(task, 0):,}" for split in splits)] for task in tasks]
    groups = [[group, f"{count:,}"] for group, count in sorted(found["groups"].items())]
    media = [[kind, f"{count:,}"] for kind, count in sorted(found["media"].items())]
    return [
        _table(["task", *splits], counts),
        tag("h3", "Modality groups"),
        _table(["media of a sample", "samples"], groups),
        tag("h3", "Media files"),
        _table(["kind", "files"], media),
    ]


def _lengths(found: Mapping[str, Any]) -> list[Html]:
    lengths = {int(length): count for length, count in found["lengths"].items()}
    bins = histogram(lengths)
    if not bins:
        return [tag("p", "No usable sample.", class_="missing")]
    marks = ", ".join(f"{label} {quantile(lengths, q)}" for label, q in (("half up to", 0.5), ("95 % up to", 0.95)))
    total = sum(length * count for length, count in lengths.items())
    text = f"Tokens of a sample, media included: {marks}, longest {max(lengths)}; {total:,} in all."
    return [tag("p", text, class_="lead"), _chart(bins)]


def _chart(bins: list[tuple[int, int, int]]) -> Html:
    most = max(count for *_, count in bins)
    step = (WIDTH - LEFT) / len(bins)
    height = HEIGHT - BOTTOM - TOP
    bars = []
    for i, (low, high, count) in enumerate(bins):
        tall = height * count / most
        title = tag("title", f"{low} to {high} tokens: {count:,} samples")
        place = {"x": LEFT + i * step, "y": HEIGHT - BOTTOM - tall, "width": max(step - 1, 0.5), "height": tall}
        bars.append(tag("g", title, tag("rect", **place, class_="mark c-accent")))
    labels = [
        tag("text", f"{most:,}", x=LEFT - 7, y=TOP + 8, text_anchor="end"),
        tag("text", "0", x=LEFT - 7, y=HEIGHT - BOTTOM, text_anchor="end"),
        tag("text", bins[0][0], x=LEFT, y=HEIGHT - 10),
        tag("text", bins[-1][1], x=WIDTH, y=HEIGHT - 10, text_anchor="end"),
    ]
    axis = tag("line", x1=LEFT, x2=WIDTH, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, class_="axis")
    image = tag("svg", bars, axis, labels, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label="Token lengths")
    return tag("figure", image, class_="chart")


def _repeats(found: Mapping[str, Any]) -> list[Html]:
    copies = tag("p", f"{found['copies']:,} media files have the content of another one: encoded once.", class_="lead")
    if not found["repeats"]:
        return [tag("p", "No sample repeats another one.", class_="lead"), copies]
    rows = [
        [f"{first[0]} {first[1]}", f"{second[0]} {second[1]}", f"{count:,}"]
        for count, first, second in ((r["count"], r["first"], r["second"]) for r in found["repeats"])
    ]
    lead = f"{found['repeated']:,} samples have the conversation and the media of another one, in any split."
    return [tag("p", lead, class_="lead"), _table(["first", "again", "times"], rows), copies]


def _bad(found: Mapping[str, Any]) -> list[Html]:
    if not found["bad"]:
        return [tag("p", "Every record can be used.", class_="lead")]
    rows = [[reason, f"{count:,}"] for reason, count in found["reasons"].items()]
    lead = ["Each of them with its file and its place: ", tag("a", "quarantine.jsonl", href="quarantine.jsonl"), "."]
    return [tag("p", lead, class_="lead"), _table(["reason", "records"], rows)]


def _examples(examples: list[Mapping[str, Any]]) -> Html:
    cards = []
    for example in examples:
        media = [
            tag("p", f"{item['kind']}: ", tag("code", item["path"]), class_="muted", style="overflow-wrap:anywhere")
            for item in example["media"]
        ]
        facts = f"{example['split']} {example['id']}, {example['task']}, {example['tokens']} tokens"
        question = tag("p", example["question"], class_="question")
        cards.append(
            tag("div", media, question, tag("p", example["answer"]), tag("p", facts, class_="muted"), class_="card")
        )
    return tag("div", cards, class_="cards")
