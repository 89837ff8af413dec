"""Speculative decoding by prompt look-up (vLLM's ngram, Hugging Face's prompt lookup): what followed the last words
when they came before is what may follow now. One pass checks all of it; what the model says otherwise is dropped."""

from __future__ import annotations

import numpy as np

# Last tokens that must have come before, the most telling first.
NGRAMS = (3, 2)


def propose(context: np.ndarray, most: int) -> list[int]:
    """Up to ``most`` tokens that may follow ``context`` [n] int64, in which negative numbers are no text.

    They are those after the latest earlier place of its last tokens, and after those themselves: of a, b, a, b come
    a, b, a, b, ...
    """
    for size in NGRAMS:
        last = len(context) - size
        if most < 1 or last < 1:
            continue
        found = np.ones(last, bool)
        for place in range(size):
            found &= context[place : last + place] == context[last + place]
        places = np.flatnonzero(found)
        if not len(places):
            continue
        begin = int(places[-1]) + size
        following = np.resize(context[begin:], most)  # repeats what is too short
        media = np.flatnonzero(following < 0)
        return following[: media[0] if len(media) else most].tolist()
    return []
