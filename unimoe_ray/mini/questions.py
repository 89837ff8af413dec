"""What is asked about pictures: easy-VQA's questions, what they tell, and conversations made of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from unimoe_ray.errors import UnimoeError

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")


@dataclass(frozen=True)
class Picture:
    """An easy-VQA picture: (question, answer) as in the data set but for the question mark."""

    path: Path
    turns: tuple[tuple[str, str], ...]

    @cached_property
    def content(self) -> tuple[str, str] | None:
        """Colour and shape of its one object, where its own questions tell both."""
        colour, shape = describe(self.turns)
        return (colour, shape) if colour and shape else None


def read_pictures(folder: Path) -> list[Picture]:
    """One official split (a folder with questions.json and images/), by number. Raises UnimoeError."""
    source = folder / "questions.json"
    turns: dict[int, list[tuple[str, str]]] = {}
    try:
        for question, answer, number in json.loads(source.read_text()):
            turns.setdefault(int(number), []).append((question.rstrip("?").strip().lower(), answer))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UnimoeError(f"{source}: not easy-VQA's list of [question, answer, image] ({error})") from None
    return [Picture(folder / "images" / f"{number}.png", tuple(turns[number])) for number in sorted(turns)]


def describe(turns: Iterable[tuple[str, str]]) -> tuple[str | None, str | None]:
    """(colour, shape) of the picture's one object, each None where the answers don't settle it."""
    return _settle(turns, COLOURS), _settle(turns, SHAPES)


def _settle(turns: Iterable[tuple[str, str]], values: tuple[str, ...]) -> str | None:
    possible = set(values)
    for question, answer in turns:
        words = question.split()
        named = possible & set(words)
        if answer in ("yes", "no"):
            negated = "no" in words or "not" in words
            possible = (named or possible) if (answer == "yes") != negated else possible - named
        elif answer in values:
            possible = {answer}
        elif named:
            # "what color is the circle" has a circle in it.
            possible = named
    return possible.pop() if len(possible) == 1 else None


def conversations(picture: Picture, rounds: int, rng: random.Random) -> list[tuple[tuple[str, str], ...]]:
    """``rounds`` questions about the picture, none twice, as single ones and runs of two or three in equal number."""
    questions = rng.sample(picture.turns, min(rounds, len(picture.turns)))
    result = []
    while questions:
        length = 1 if rng.random() < 0.45 else rng.choice((2, 3))
        result.append(tuple(questions[:length]))
        questions = questions[length:]
    return result
