"""The text-only task: which of two numbers is larger, which of two words is of a kind."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator

from unimoe_ray.mini.example import Example, draw, stream
from unimoe_ray.mini.questions import COLOURS, SHAPES
from unimoe_ray.mini.render import DIRECTIONS
from unimoe_ray.mini.sound_tasks import EVENTS
from unimoe_ray.mini.speech_tasks import NUMBERS

# Words of the other tasks by what they are.
_KINDS = {
    "a color": COLOURS,
    "a shape": SHAPES,
    "a number": NUMBERS,
    "a sound": tuple(EVENTS),
    "a direction": tuple(DIRECTIONS),
}


def text_examples(seed: int, split: str, count: int) -> list[Example]:
    """Comparisons of numbers and choices of words. A question's split follows from its text alone."""
    rng = stream(seed, split, "text")
    examples = []
    for wanted, pool in ((count // 2, _comparisons()), (count - count // 2, _choices())):
        own = [turn for turn in pool if _split_of(turn[0]) == split]
        examples += [Example("text", (turn,)) for turn in draw(own, wanted, rng)]
    rng.shuffle(examples)
    return examples


def _comparisons() -> Iterator[tuple[str, str]]:
    for a, b in itertools.permutations(range(20), 2):
        yield f"which is larger {a} or {b}", str(max(a, b))


def _choices() -> Iterator[tuple[str, str]]:
    for kind, words in _KINDS.items():
        others = [word for name, rest in _KINDS.items() if name != kind for word in rest]
        for right, wrong in itertools.product(words, others):
            yield f"which word is {kind} {right} or {wrong}", right
            yield f"which word is {kind} {wrong} or {right}", right


def _split_of(question: str) -> str:
    """test for 2 of 10 questions, dev for 1, train for 7."""
    bucket = hashlib.sha256(question.encode()).digest()[0] % 10
    return "test" if bucket < 2 else "dev" if bucket == 2 else "train"
