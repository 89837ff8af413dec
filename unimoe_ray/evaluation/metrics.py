"""Accuracy and its baselines."""

from __future__ import annotations

from collections import Counter


def exact_match(answer: str, expected: str) -> bool:
    """The whole answer, character for character, but for outer spaces."""
    return answer.strip() == expected.strip()


def task_score(answers: list[str], expected: list[str]) -> dict[str, float | int]:
    """Exact-match accuracy, the share of the most frequent expected answer, and how many answers there are."""
    n = len(expected)
    if not n:
        raise ValueError("no answers to score")
    right = sum(exact_match(a, e) for a, e in zip(answers, expected, strict=True))
    majority = Counter(expected).most_common(1)[0][1]
    return {"accuracy": round(right / n, 4), "majority": round(majority / n, 4), "n": n}
