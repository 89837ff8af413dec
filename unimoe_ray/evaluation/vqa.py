"""VQA accuracy as its authors publish it (github.com/GT-Vision-Lab/VQA, evaluation of 2021), and TextVQA's version of
it (the M4C evaluator of MMF, which Uni-MoE and LLaVA use)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(n) for n, word in enumerate(_NUMBERS)}
# Each is also recognised with one of its apostrophes left out, and then gets it back.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[: mark.start()] + word[mark.end() :]: word for word in _CONTRACTED.split() for mark in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}  # the wrong way round in the published table
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


def normalise(text: str) -> str:
    """Punctuation, articles, number words and contractions as the published evaluation treats them."""
    return _words(_without_punctuation(text.replace("\n", " ").replace("\t", " ").strip()))


def normalise_textvqa(text: str) -> str:
    """TextVQA's: the same after lower-casing, without commas and question marks, and with 's as a word."""
    return normalise(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """0 to 1: min(matches / 3, 1), averaged over leaving out one of the people who answered (ten, as a rule).

    Where all of them agree, nothing is normalised, as published: "2." is then not "2".
    """
    given, said = _plain(answer), [_plain(reference) for reference in references]
    if len(set(said)) > 1:
        given, said = normalise(given), [normalise(reference) for reference in said]
    return _leave_one_out(given, said)


def textvqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """``vqa_accuracy`` with TextVQA's normalisation, always applied."""
    return _leave_one_out(normalise_textvqa(answer), [normalise_textvqa(reference) for reference in references])


def matches(answer: str, references: Sequence[str], normalised: Callable[[str], str] = normalise) -> bool:
    """Exact match with any of the references, after normalisation and in lower case. What normalisation leaves nothing
    of ("a", or no answer) matches nothing."""
    given = normalised(answer.lower())
    return bool(given) and given in {normalised(reference.lower()) for reference in references}


def contains(answer: str, references: Sequence[str]) -> bool:
    """Whether a reference stands in the answer as whole words, after normalisation."""
    given = f" {normalise(answer.lower())} "
    return any(words and f" {words} " in given for words in (normalise(reference.lower()) for reference in references))


def _plain(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _leave_one_out(given: str, said: Sequence[str]) -> float:
    """Those who said it see one match less than the others."""
    n, hits = len(said), Counter(said)[given]
    return (hits * min(1.0, (hits - 1) / 3) + (n - hits) * min(1.0, hits / 3)) / n


def _without_punctuation(text: str) -> str:
    """A mark beside a space goes, any other becomes a space; with a number such as 1,000 in the text all of them go."""
    out, number = text, _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        out = out.replace(mark, "" if number or f"{mark} " in text or f" {mark}" in text else " ")
    return _PERIOD.sub("", out)


def _words(text: str) -> str:
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
