"""Sample answers of each task, with their media."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from unimoe_ray.report.html import Child, Html, missing, tag
from unimoe_ray.report.media import Shown, bring
from unimoe_ray.report.read import RunData

SAMPLES_PER_TASK = 4


def answers(data: RunData, media: Path) -> Child:
    """A few answers of each task as cards; their media are brought into the folder ``media``."""
    if not data.samples:
        return missing("No sample answers: they are written by an evaluation.")
    by_task: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for sample in data.samples:
        by_task[str(sample["task"])].append(sample)
    parts: list[Html] = []
    for task, samples in by_task.items():
        chosen = pick(samples, SAMPLES_PER_TASK)
        right = sum(bool(sample["correct"]) for sample in samples)
        parts.append(
            tag("h3", task, tag("span", f"{right} of {len(samples)} right", class_="muted"), id=f"task-{task}")
        )
        parts.append(tag("div", [_card(data.folder, sample, media) for sample in chosen], class_="cards"))
    lead = f"{SAMPLES_PER_TASK} answers of each task, wrong ones among them where there are any."
    return [tag("p", lead, class_="lead"), parts]


def pick(samples: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Spread over the file: up to half of them wrong, the rest right; right ones first."""
    right = [sample for sample in samples if sample["correct"]]
    wrong = [sample for sample in samples if not sample["correct"]]
    wrongs = min(len(wrong), max(count // 2, count - len(right)))
    return _spread(right, count - wrongs) + _spread(wrong, wrongs)


def _spread(samples: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    count = min(count, len(samples))
    return [samples[i * len(samples) // count] for i in range(count)]


def _card(folder: Path, sample: dict[str, Any], media: Path) -> Html:
    correct = bool(sample["correct"])
    question = str(sample["question"]).strip()
    spoken = any(item.get("kind") == "speech" for item in _media_of(sample))
    verdict = tag("dt", "✓ right" if correct else "✗ wrong", class_="verdict")
    words = [tag("div", verdict, tag("dd", str(sample["answer"]) or "(nothing)"))]
    if not correct:
        words.append(tag("div", tag("dt", "expected"), tag("dd", str(sample["expected"]))))
    return tag(
        "article",
        tag("div", [_figure(folder, item, media) for item in _media_of(sample)], class_="media") or None,
        tag("p", question, class_="question")
        if question
        else tag("p", "asked aloud" if spoken else "no text", class_="question unwritten"),
        tag("dl", words),
        class_="card " + ("right" if correct else "wrong"),
    )


def _media_of(sample: dict[str, Any]) -> list[dict[str, Any]]:
    """The files to show; the sound track of a shown video is heard there."""
    given = sample.get("media")
    items = [i for i in given if isinstance(i, dict) and "path" in i] if isinstance(given, list) else []
    videos = {item["path"] for item in items if item.get("kind") == "video"}
    return [item for item in items if item.get("kind") == "video" or item["path"] not in videos]


def _figure(folder: Path, item: dict[str, Any], media: Path) -> Html:
    kind, path = str(item.get("kind")), Path(str(item["path"]))
    source = next((p for p in (folder / path, path) if p.is_file()), None)
    shown = bring(kind, source, media) if source else None
    if shown is None:
        return tag("p", f"{kind}: {path.name} cannot be shown", class_="missing")
    return _element(shown, kind)


def _element(shown: Shown, kind: str) -> Html:
    source = f"media/{shown.name}"
    size = {"width": shown.size[0], "height": shown.size[1]} if shown.size else {}
    pixels = "pixels" if shown.size and max(shown.size) <= 160 else None
    if shown.kind == "image":
        return tag("img", src=source, alt=kind, loading="lazy", class_=pixels, **size)
    if shown.kind == "video":
        poster = f"media/{shown.poster}"
        return tag(
            "video", src=source, poster=poster, controls=True, loop=True, preload="metadata", class_=pixels, **size
        )
    return tag("audio", src=source, controls=True, preload="metadata", aria_label=kind)
