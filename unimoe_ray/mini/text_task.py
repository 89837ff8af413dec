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
        own = [(question, answer) for question, answer, owner in pool if owner == split]
        examples += [Example("text", (turn,)) for turn in draw(own, wanted, rng)]
    rng.shuffle(examples)
    return examples


def _comparisons() -> Iterator[tuple[str, str, str]]:
    """Of two numbers only one order is ever held out: how they compare is in the other one, for training to tell."""
    for low, high in itertools.combinations(range(20), 2):
        bucket, turned = _hash(f"{low} {high}")
        owner = "test" if bucket < 4 else "dev" if bucket < 6 else "train"
        for a, b in ((low, high), (high, low)):
            held_out = (a > b) == turned
            yield f"which is larger {a} or {b}", str(high), owner if held_out else "train"


def _choices() -> Iterator[tuple[str, str, str]]:
    for kind, words in _KINDS.items():
        others = [word for name, rest in _KINDS.items() if name != kind for word in rest]
        for right, wrong in itertools.product(words, others):
            for a, b in ((right, wrong), (wrong, right)):
                question = f"which word is {kind} {a} or {b}"
                bucket, _ = _hash(question)
                yield question, right, "test" if bucket < 2 else "dev" if bucket == 2 else "train"


def _hash(text: str) -> tuple[int, bool]:
    """0 to 9 and a coin, from the text alone."""
    digest = hashlib.sha256(text.encode()).digest()
    return digest[0] % 10, bool(digest[1] % 2)
