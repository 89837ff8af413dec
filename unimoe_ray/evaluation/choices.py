"""Which option, or which of yes and no, an answer means. What is not clear is None: it is counted, never guessed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase

_ALONE = re.compile(r"^\W*([A-Z])\W*$", re.IGNORECASE)
_LEADING = re.compile(r"^\W*([A-Z])\s*[.):,：]", re.MULTILINE)
# "A" and "I" are words of sentences too, unless what follows rules that out.
_LETTER = r"([B-HJ-Z]|[AI](?=\s*(?:$|[.,;:)/*\]\"'](?!\w)|(?:and|or|is|was|because|since)\b)))(?![\w'’])"
_NAMED = re.compile(
    r"\b(?:[Aa]nswers?|[Oo]ptions?|[Cc]hoices?)\b(?:\s+(?:is|are|would\s+be|must\s+be|should\s+be))?[\s:：*(\"'\[]*"
    + _LETTER
)
_BRACKETED = re.compile(r"\(([A-Z])\)")
_CAPITAL = re.compile(r"(?<![\w'’])" + _LETTER)
_OPTION_LINE = re.compile(r"^\s*\(?([A-Z])\s*[.):]\s*(.+?)\s*$", re.MULTILINE)


def letters(count: int) -> str:
    return ascii_uppercase[:count]


def options_in(text: str) -> tuple[str, ...]:
    """The options that a question lists, a line each (``A. ...``), in order; none if the letters do not begin with A
    and follow each other."""
    found = _OPTION_LINE.findall(text)
    return tuple(option for _, option in found) if [x for x, _ in found] == list(letters(len(found))) else ()


def choose(answer: str, options: Sequence[str]) -> str | None:
    """The letter of the option that an answer names, by letter or by its words; None if it names none, or several.

    In this order, and the first that says something decides: nothing but a letter; a letter in front ("B. a cat");
    "the answer is B", or a letter in brackets; the words of an option; a capital that stands alone.
    """
    allowed = set(letters(len(options)))
    if found := _ALONE.match(answer):
        return _only({found.group(1).upper()} & allowed)
    capitals = set(_CAPITAL.findall(answer)) & allowed
    if leading := set(_LEADING.findall(answer)) & allowed:
        return _only(leading | (set(_BRACKETED.findall(answer)) & allowed))
    for pattern in (_NAMED, _BRACKETED):
        if named := set(pattern.findall(answer)) & allowed:
            return _only(named | capitals)
    return _only(_named_by_words(answer, options) or capitals)


def yes_or_no(answer: str) -> str | None:
    """``yes`` or ``no``, whichever is among the words of the first sentence; None for neither or both."""
    words = set(re.findall(r"[a-z']+", answer.split(".")[0].lower()))
    said_no = bool(words & {"no", "not", "n't"}) or any(word.endswith("n't") for word in words)
    said_yes = "yes" in words
    return None if said_yes == said_no else "yes" if said_yes else "no"


def pope_label(answer: str) -> str:
    """POPE's own reading (evaluate.py of its authors): no, if "No", "no" or "not" is a word of the first sentence,
    else yes, whatever it says."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def _only(found: set[str]) -> str | None:
    return next(iter(found)) if len(found) == 1 else None


def _named_by_words(answer: str, options: Sequence[str]) -> set[str]:
    """Letters of the options whose words the answer has; where one option is part of another, the longer one."""
    text = f" {_plain(answer)} "
    found: set[str] = set()
    named = zip(letters(len(options)), map(_plain, options), strict=True)
    for letter, option in sorted(named, key=lambda pair: -len(pair[1])):
        if option and f" {option} " in text:
            found.add(letter)
            text = text.replace(f" {option} ", "  ")
    return found


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+(?:\.\d+)?", text.lower()))
