"""Conversations about media put into text: where a file's soft tokens would be stand words that say what is in it.

A small language model that has read these finds attributes in a prefix before its connectors are trained.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from unimoe_ray.mini.example import Example, Split, draw, stream

FILLER = "blank"

# Shares of the tasks among the training examples; easy-VQA's yes/no questions are the hard part of reading a prefix.
SHARES = {
    "image_vqa": 0.40,
    "text": 0.20,
    "spoken_question": 0.10,
    "video_sound": 0.06,
    "video_direction": 0.04,
    "video_object": 0.04,
    "spoken_word": 0.03,
    "transcribe": 0.03,
    "sound_event": 0.02,
    "caption_image": 0.02,
    "caption_video": 0.02,
    "caption_sound": 0.02,
    "fashion": 0.02,
}


def verbalise(example: Example, rng: random.Random) -> Example:
    """The same conversation, text only, task ``words_<task>``. ``example.content`` must be known."""
    blocks = [_block(kind, words, rng) for (kind, _), words in zip(example.media, example.content, strict=True)]
    (question, answer), *rest = example.turns
    first = "".join(" ".join(block) + "\n" for block in blocks) + question
    return Example(f"words_{example.task}", ((first, answer), *rest))


def words_examples(seed: int, split: str, examples: Sequence[Example], count: int, dev_count: int) -> list[Example]:
    """Verbalised draws from the examples of a split, fresh noise each: ``count`` in all, by SHARES, or ``dev_count``
    of each task in the dev split. Tasks that are not there leave their share to the others."""
    pools: Split = {}
    for example in examples:
        if example.task in SHARES and example.content is not None:
            pools.setdefault(example.task, []).append(example)
    total = sum(SHARES[task] for task in pools)
    result = []
    for task in sorted(pools):
        wanted = round(count * SHARES[task] / total) if split == "train" else dev_count
        rng = stream(seed, split, "words", task)
        result += [verbalise(example, rng) for example in draw(pools[task], wanted, rng)]
    return result


def _block(kind: str, words: Sequence[str], rng: random.Random) -> list[str]:
    if kind == "speech":
        return _sequence(words, rng)
    # About as many words as the file has soft tokens, or fewer: fewer are read faster.
    fewest, most = {"image": (1, 16), "audio": (1, 6), "video": (4, 16)}[kind]
    return _bag(words, rng.randint(max(fewest, len(words)), most), rng)


def _bag(words: Sequence[str], size: int, rng: random.Random) -> list[str]:
    """Every word at least once, anywhere, among copies and fillers."""
    bag = [rng.choice(words) if rng.random() < 0.6 else FILLER for _ in range(size)]
    for word, place in zip(words, rng.sample(range(size), len(words)), strict=True):
        bag[place] = word
    return bag


def _sequence(words: Sequence[str], rng: random.Random) -> list[str]:
    """The words in order, stretched by fillers and repetitions as speech is in time."""
    size = max(len(words), rng.randint(1, 16) if len(words) < 4 else rng.randint(6, 20))
    sequence = [FILLER] * size
    for word, place in zip(words, sorted(rng.sample(range(size), len(words))), strict=True):
        sequence[place] = word
    for place in range(1, size):
        if sequence[place] == FILLER and sequence[place - 1] != FILLER and rng.random() < 0.4:
            sequence[place] = sequence[place - 1]
    return sequence
