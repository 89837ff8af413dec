"""Other wordings of the training questions, so that the model takes what people type, not only the suite's own form."""

from __future__ import annotations

import random
from dataclasses import replace

from unimoe_ray.mini.example import Example

_OTHERS = {
    "what shape is in the image": ("what shape is it", "what is the shape", "which shape is this"),
    "what color is the shape": ("what color is it", "what is the color", "which color is this"),
    "what is this": ("what is it", "what is in the image"),
    "what do you hear": ("what is it", "what is this sound"),
    "what was said": ("what did they say", "what do you hear"),
    "which way does it move": ("where does it move", "where is it going"),
    "what is moving": ("what moves", "what is in the video"),
}


def reword(example: Example, rng: random.Random) -> Example:
    """The same conversation; each question may be put in other words, get a question mark or a capital letter."""
    return replace(example, turns=tuple((_reword(question, rng), answer) for question, answer in example.turns))


def _reword(question: str, rng: random.Random) -> str:
    # Put into words, a file's content stands before its question, on a line of its own.
    *before, asked = question.split("\n")
    if asked in _OTHERS and rng.random() < 0.25:
        asked = rng.choice(_OTHERS[asked])
    if rng.random() < 0.15:
        asked = asked[:1].upper() + asked[1:]
    if rng.random() < 0.35 and asked.split(" ", 1)[0].lower() in ("what", "which", "is", "does", "where"):
        asked += "?"
    return "\n".join([*before, asked])
