"""Conversations that are longer than the model can take, cut on the side of the prompt.

What goes first is what matters least for the next answer: whole turns, the oldest first, and after them the words of
questions, the oldest first again. Never cut are media (their soft tokens stand together or go with their turn), the
template, and what the model is to say: answers that are learned, and the last question's media.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from unimoe_ray.data.schema import PLACEHOLDER, Sample

# A placeholder, or a word with the space before it; what has no spaces goes in pieces.
_UNIT = re.compile(rf"{PLACEHOLDER.pattern}|\s*(?:(?!{PLACEHOLDER.pattern})\S){{1,16}}|\s+")


@dataclass(frozen=True)
class Shortened:
    """turns, media: how many were dropped from the beginning; characters: cut from the questions that are left."""

    sample: Sample
    turns: int
    media: int
    characters: int

    @property
    def note(self) -> str:
        """For people, what is gone."""
        parts = [f"the first {self.turns} turns"] if self.turns else []
        parts += [f"{self.characters} characters of questions"] if self.characters else []
        media = f" (with {self.media} media files)" if self.media else ""
        return f"{' and '.join(parts)}{media} left out: longer than the model can take"


def shorten(sample: Sample, fits: Callable[[Sample], bool], *, keep_turns: bool) -> Shortened | None:
    """The sample with as little cut as lets it fit; None if that is not enough. ``fits(sample)`` compares the spliced
    length with the limit.

    keep_turns: all answers are learned, so no turn is dropped; only words of questions are
    """
    dropped = 0 if keep_turns else _least(len(sample.turns) - 1, lambda turns: fits(_without(sample, turns)))
    rest = _without(sample, dropped)
    words = sum(len(_words(question)) for question, _ in rest.turns)
    found = _cut(rest, _least(words, lambda count: fits(_cut(rest, count))))
    if not fits(found):
        return None
    before, after = (sum(len(question) for question, _ in some.turns) for some in (rest, found))
    return Shortened(found, dropped, len(sample.media) - len(found.media), before - after)


def _least(most: int, enough: Callable[[int], bool]) -> int:
    """The smallest count up to ``most`` that is enough, by bisection; ``most`` if none is."""
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


def _without(sample: Sample, turns: int) -> Sample:
    media = sum(len(PLACEHOLDER.findall(question)) for question, _ in sample.turns[:turns])
    return replace(sample, turns=sample.turns[turns:], media=sample.media[media:])


def _words(question: str) -> list[str]:
    """What may be cut from a question, in order."""
    return [unit[0] for unit in _UNIT.finditer(question) if not PLACEHOLDER.fullmatch(unit[0])]


def _cut(sample: Sample, words: int) -> Sample:
    """Without this many words, the first of the questions."""
    turns = []
    for question, answer in sample.turns:
        here = min(words, len(_words(question)))
        words -= here
        turns.append((_cut_text(question, here) if here else question, answer))
    return replace(sample, turns=tuple(turns))


def _cut_text(question: str, words: int) -> str:
    kept = []
    for unit in _UNIT.finditer(question):
        if words and not PLACEHOLDER.fullmatch(unit[0]):
            words -= 1
        else:
            kept.append(unit[0])
    return "".join(kept).lstrip()
