"""CIDEr-D of captions (Vedantam et al. 2015), as pycocoevalcap computes it, with a tokenizer in Python for Java's.

pycocoevalcap itself is a hundred megabytes of Java archives; this gives its values (see the tests).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

N = 4
SIGMA = 6.0
# What the Penn Treebank tokenizer makes of English captions.
_TOKEN = re.compile(
    r"""
    \d+(?:[.,:/]\d+)+                                     # 1,000  3.5  10:30
    | '\d\ds?                                             # '90s
    | (?:[a-z]\.){2,}                                     # u.s.
    | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc|prof|gen|rev|mt|inc|ltd|co|corp)\.
    | (?:no\.(?=\s+\d))
    | \w+(?:[-'’&/.]\w+)*-?(?<!-)                         # high-pitched  o'clock  under_score
    | \.\.\.
    | --+
    | \S
    """,
    re.VERBOSE,
)
_CLITIC = re.compile(r"(?<=[a-z])(?:n['’]t|['’](?:s|m|d|ll|re|ve))$")
_SPLIT = {"cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"), "wanna": ("wan", "na")}
_SPLIT |= {"gimme": ("gim", "me"), "lemme": ("lem", "me"), "y'all": ("y'", "all")}
# pycocoevalcap drops punctuation after tokenisation; it looks for brackets in capitals, and so keeps them.
_DROPPED = set("'’‘\"“”`.?!,:;-") | {"--", "..."}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


def tokenise(caption: str) -> list[str]:
    """Lower-case Treebank tokens without punctuation but brackets."""
    tokens: list[str] = []
    for token in _TOKEN.findall(caption.lower()):
        if token in _DROPPED:
            continue
        clitic = _CLITIC.search(token)
        if token in _SPLIT:
            tokens += _SPLIT[token]
        elif clitic and clitic.start():
            tokens += [token[: clitic.start()], clitic.group().replace("’", "'")]
        else:
            tokens.append(_BRACKETS.get(token, token))
    return tokens


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption, 0 to 10, against its references; rarity is counted over the references of all.

    Published figures are the mean times 100. Raises ValueError for a caption without references.
    """
    given = [_ngrams(caption) for caption in captions]
    known = [[_ngrams(reference) for reference in of_one] for of_one in references]
    if len(given) != len(known) or not all(known):
        raise ValueError(f"{len(known)} lists of references, none of them empty, are wanted for {len(given)} captions")
    documents = Counter(ngram for of_one in known for ngram in {ngram for counts in of_one for ngram in counts})
    log_total = math.log(max(len(known), 1))
    rarity = {ngram: log_total - math.log(count) for ngram, count in documents.items()}
    scores = []
    for counts, of_one in zip(given, known, strict=True):
        weighted = _weigh(counts, rarity, log_total)
        similar = [_similarity(weighted, _weigh(reference, rarity, log_total)) for reference in of_one]
        scores.append(10.0 * sum(similar) / len(similar))
    return scores


_Ngrams = Counter[tuple[str, ...]]
_Weighted = tuple[list[dict[tuple[str, ...], float]], list[float], int]


def _ngrams(caption: str) -> _Ngrams:
    words = tokenise(caption)
    return Counter(tuple(words[i : i + n]) for n in range(1, N + 1) for i in range(len(words) - n + 1))


def _weigh(counts: _Ngrams, rarity: dict[tuple[str, ...], float], unknown: float) -> _Weighted:
    """tf-idf by length of n-gram, its norms, and the length, which the published code counts in bigrams."""
    vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(N)]
    for ngram, count in counts.items():
        vectors[len(ngram) - 1][ngram] = count * rarity.get(ngram, unknown)
    norms = [math.sqrt(sum(value**2 for value in vector.values())) for vector in vectors]
    return vectors, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2)


def _similarity(given: _Weighted, reference: _Weighted) -> float:
    """Mean over n of the clipped cosine, with a penalty for another length."""
    penalty = math.exp(-((given[2] - reference[2]) ** 2) / (2 * SIGMA**2))
    total = 0.0
    for n in range(N):
        norm = given[1][n] * reference[1][n]
        product = sum(
            min(value, other) * other for ngram, value in given[0][n].items() if (other := reference[0][n].get(ngram))
        )
        total += product / norm if norm else 0.0
    return penalty * total / N
