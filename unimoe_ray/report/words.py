"""Numbers and dates in words."""

from __future__ import annotations

import time


def duration(seconds: float) -> str:
    """From 0.4 s to hours and minutes."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def short(number: float) -> str:
    """Three digits and a unit: 15.8 M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"


def count(number: int, noun: str) -> str:
    """3 records, 1 record."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def date(seconds: float) -> str:
    """Local time, to the minute."""
    moment = time.localtime(seconds)
    return f"{moment.tm_mday} {time.strftime('%B %Y, %H:%M', moment)}"
