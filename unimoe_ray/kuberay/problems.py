"""What is wrong in a manifest, and where."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

Path = tuple[str | int, ...]
_PLAIN = re.compile(r"[A-Za-z0-9_-]+")


class Problem(NamedTuple):
    """path: of the field, ``spec.workerGroupSpecs[0].minReplicas``; reason: one line."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path or 'the document'}: {self.reason}"


def problem(path: Iterable[str | int], reason: str) -> Problem:
    return Problem(dotted(path), reason)


def dotted(path: Iterable[str | int]) -> str:
    """``("spec", "groups", 0, "a.b/c")`` as ``spec.groups[0]['a.b/c']``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif _PLAIN.fullmatch(part):
            text += f".{part}" if text else part
        else:
            text += f"['{part}']"
    return text
