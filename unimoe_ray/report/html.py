"""Markup in which every text is escaped unless it is markup already."""

from __future__ import annotations

import html
from collections.abc import Iterable


class Html(str):
    """Markup: put into the page as it is."""


Child = str | int | float | None | Iterable["Child"]

_VOID = {"br", "img", "input", "link", "meta", "path", "line", "rect", "circle", "polyline"}


def tag(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Html:
    """An element. ``class_`` is class, other underscores are hyphens; None and False leave an attribute out."""
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        parts.append(key if value is True else f'{key}="{html.escape(_text(value))}"')
    opening = " ".join(parts)
    if name in _VOID:
        return Html(f"<{opening}>" if name in ("br", "img", "input", "link", "meta") else f"<{opening}/>")
    return Html(f"<{opening}>{join(children)}</{name}>")


def join(children: Child) -> Html:
    """Children one after the other; text is escaped, None is nothing."""
    if children is None:
        return Html("")
    if isinstance(children, Html):
        return children
    if isinstance(children, str | int | float):
        return Html(html.escape(_text(children)))
    return Html("".join(map(join, children)))


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def missing(text: str, command: str | None = None) -> Html:
    """A line in the place of what the run does not have."""
    return tag("p", text, [" ", tag("code", command)] if command else None, class_="missing")
