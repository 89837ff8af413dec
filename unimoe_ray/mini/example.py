"""One conversation of the suite before it is written, and the random streams that make it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

SPLITS = ("train", "dev", "test")
Item = TypeVar("Item")


class Count(NamedTuple):
    """How many per split."""

    train: int
    dev: int
    test: int


@dataclass(frozen=True)
class Example:
    """turns: (question, answer); media: (kind, path relative to the suite), in the order of the placeholders;
    content: for each of the media, the words that say what is in it, or None where the data set does not tell."""

    task: str
    turns: tuple[tuple[str, str], ...]
    media: tuple[tuple[str, str], ...] = ()
    content: tuple[tuple[str, ...], ...] | None = ()

    def record(self, identifier: str) -> dict:
        """The official conversation format; the placeholders stand before the first question."""
        placeholders = "".join(f"<{kind}>\n" for kind, _ in self.media)
        conversation = []
        for number, (question, answer) in enumerate(self.turns):
            conversation.append({"from": "human", "value": question if number else placeholders + question})
            conversation.append({"from": "gpt", "value": answer})
        return {"id": identifier, "task": self.task, **dict(self.media), "conversations": conversation}


Split = dict[str, list[Example]]


def stream(seed: int, *names: str | int) -> random.Random:
    """A random stream of its own for every name, the same in every process."""
    return random.Random("/".join(map(str, (seed, *names))))


def draw(items: Sequence[Item], count: int, rng: random.Random) -> Iterator[Item]:
    """``count`` items in random order; none comes twice before all have come once."""
    if not items:
        raise ValueError("nothing to draw from")
    while count > 0:
        yield from rng.sample(items, min(count, len(items)))
        count -= len(items)
