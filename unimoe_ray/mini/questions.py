"""What is asked: easy-VQA's questions and what they tell about a picture, and the text-only task."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from unimoe_ray.errors import UnimoeError
from unimoe_ray.mini.example import Example, draw, stream

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ANIMALS = ("cat", "cow", "dog", "horse", "sheep")


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


_WORDS = {"a color": COLOURS, "a shape": (*SHAPES, "square"), "a number": NUMBERS, "an animal": ANIMALS}
_ALL_WORDS = tuple(word for words in _WORDS.values() for word in words)


def text_examples(seed: int, split: str, count: int) -> list[Example]:
    """Comparisons, choices and positions. Which question belongs to which split follows from its text alone."""
    rng = stream(seed, split, "text")
    compare, choose = count * 36 // 100, count * 32 // 100
    # There are far more lists of words than needed: draw some.
    lists = (tuple(rng.sample(_ALL_WORDS, 3)) for _ in range(20 * count))
    pools = {
        "compare": (compare, _comparisons()),
        "choose": (choose, _choices()),
        "position": (count - compare - choose, _positions(lists)),
    }
    examples = []
    for wanted, pool in pools.values():
        own = [turn for turn in dict.fromkeys(pool) if _split_of(turn[0]) == split]
        examples += [Example("text", (turn,)) for turn in draw(own, wanted, rng)]
    rng.shuffle(examples)
    return examples


def _comparisons() -> Iterable[tuple[str, str]]:
    for a, b in itertools.permutations(range(20), 2):
        yield f"which is larger {a} or {b}", str(max(a, b))
        yield f"which is smaller {a} or {b}", str(min(a, b))


def _choices() -> Iterable[tuple[str, str]]:
    for kind, words in _WORDS.items():
        for right, wrong in itertools.product(words, _ALL_WORDS):
            if wrong not in words:
                yield f"which word is {kind} {right} or {wrong}", right
                yield f"which word is {kind} {wrong} or {right}", right


def _positions(lists: Iterable[tuple[str, ...]]) -> Iterable[tuple[str, str]]:
    for words in lists:
        yield f"what is the first word of {' '.join(words)}", words[0]
        yield f"what is the last word of {' '.join(words)}", words[-1]


def _split_of(question: str) -> str:
    """test for 2 of 10 questions, dev for 1, train for 7."""
    bucket = hashlib.sha256(question.encode()).digest()[0] % 10
    return "test" if bucket < 2 else "dev" if bucket == 2 else "train"
