"""What a benchmark is: a declaration of its files, how they are read, asked, answered and scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unimoe_ray.data.schema import Media
from unimoe_ray.evaluation.benchmarks.files import Folder
from unimoe_ray.evaluation.intervals import Measure

SHORT = "Answer the question using a single word or phrase."


@dataclass(frozen=True)
class Question:
    """id: unique in the benchmark; group: questions that are not independent (one picture, one recording)

    prompt: with a placeholder for each of ``media``, in order
    references: what counts as right, as the benchmark gives it (a letter, where there are ``options``)
    facts: what the score, the subsets and the submission file need besides
    """

    id: str
    prompt: str
    media: tuple[Media, ...]
    references: tuple[str, ...]
    group: str
    options: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answered:
    """A question (its media left out) and what the model said."""

    question: Question
    answer: str


@dataclass(frozen=True)
class Decoding:
    """How answers are made. ``temperature`` 0 is greedy; ``beams`` above 1 are known of the original, not done here."""

    max_new_tokens: int
    temperature: float = 0.0
    beams: int = 1

    def greedy(self) -> Decoding:
        return Decoding(self.max_new_tokens)


# What Uni-MoE's eval.py has for pictures, and for most of what else it is asked.
GREEDY = Decoding(512)
SAMPLED = Decoding(1024, temperature=0.2)


@dataclass(frozen=True)
class Benchmark:
    """read(folder, split): the questions, one after another, in the order of the benchmark's file. Raises UsageError
    naming the file, and the key or column that is missing.

    files: what is looked for in the folder, for people; splits: allowed ones, the first is the default
    published: the decoding that the released Uni-MoE code has; used greedily unless asked for
    score: the figures of answered questions, the main one first; none where only a judge can score
    submit(folder, answered): writes what the benchmark's server, script or judge takes; returns the files
    """

    name: str
    title: str
    files: str
    splits: tuple[str, ...]
    published: Decoding
    read: Callable[[Folder, str], Iterator[Question]]
    score: Callable[[Sequence[Answered]], list[Measure]] | None
    submit: Callable[[Path, Sequence[Answered]], list[Path]] | None = None
