"""How long a new request would wait for a slot."""

from __future__ import annotations

import math

# Seconds after which a measurement counts for 1/e, and answers likewise.
MEMORY_S = 10.0
MEMORY_ANSWERS = 32


class Pace:
    """Fed by whoever runs the engine. Rates count only while requests wait: an engine that has little to do is no
    slower for it."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0
        self._answer_tokens = self._answers = 0.0

    def stepped(self, tokens: int, seconds: float) -> None:
        """A step in which all slots were taken gave ``tokens`` tokens of answers."""
        kept = math.exp(-seconds / MEMORY_S)
        self._tokens = self._tokens * kept + tokens
        self._seconds = self._seconds * kept + seconds

    def answered(self, tokens: int) -> None:
        kept = math.exp(-1 / MEMORY_ANSWERS)
        self._answer_tokens = self._answer_tokens * kept + tokens
        self._answers = self._answers * kept + 1

    def wait(self, bounds: list[int]) -> float:
        """Seconds until the last of those that wait gets a slot; 0 as long as nothing is known. ``bounds``: the most
        tokens that each of them may generate."""
        if not self._tokens or not self._answers:
            return 0.0
        usual = self._answer_tokens / self._answers
        return sum(min(bound, usual) for bound in bounds) * self._seconds / self._tokens
