"""The figures of answered questions, by kind of benchmark."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from unimoe_ray.evaluation import vqa
from unimoe_ray.evaluation.benchmarks.base import Answered
from unimoe_ray.evaluation.choices import choose, pope_label, yes_or_no
from unimoe_ray.evaluation.cider import cider
from unimoe_ray.evaluation.intervals import Measure

Score = Callable[[Sequence[Answered]], list[Measure]]


def vqa_score(by: str | None = None) -> Score:
    """VQA accuracy, exact match with any of the references, and the accuracy by a fact such as ``answer_type``."""

    def score(answered: Sequence[Answered]) -> list[Measure]:
        accuracy = [vqa.vqa_accuracy(a.answer, a.question.references) for a in answered]
        exact = [vqa.matches(a.answer, a.question.references) for a in answered]
        measures = [Measure.mean("VQA accuracy", accuracy), Measure.mean("exact match", exact)]
        return measures + (by_fact(answered, accuracy, by) if by else [])

    return score


def textvqa_score(answered: Sequence[Answered]) -> list[Measure]:
    accuracy = [vqa.textvqa_accuracy(a.answer, a.question.references) for a in answered]
    exact = [vqa.matches(a.answer, a.question.references, vqa.normalise_textvqa) for a in answered]
    return [Measure.mean("accuracy", accuracy), Measure.mean("exact match", exact)]


def aokvqa_score(answered: Sequence[Answered]) -> list[Measure]:
    """Direct answers: min(matches / 3, 1) of equal strings, as A-OKVQA's evaluation has it, without the questions that
    it marks as hard to answer directly; exact match with any of the ten, which Uni-MoE reports; VQA accuracy."""
    direct = [
        None if a.question.facts["difficult"] else min(1.0, a.question.references.count(a.answer.strip()) / 3)
        for a in answered
    ]
    return [
        Measure.mean("exact match", [vqa.matches(a.answer, a.question.references) for a in answered]),
        Measure.mean("direct answer", direct),
        Measure.mean("VQA accuracy", [vqa.vqa_accuracy(a.answer, a.question.references) for a in answered]),
    ]


def exact_score(answered: Sequence[Answered]) -> list[Measure]:
    """Share of the references that the answer matches (of one that is exact match; of ClothoAQA's three annotators it
    is the accuracy over all rows of its file), with the majority, and with any."""
    shares, majority, any_of = [], [], []
    for a in answered:
        given = vqa.normalise(a.answer.lower())
        said = [vqa.normalise(reference.lower()) for reference in a.question.references]
        shares.append(said.count(given) / len(said))
        majority.append(said.count(given) * 2 > len(said) if max(map(said.count, said)) * 2 > len(said) else None)
        any_of.append(given in said)
    measures = [Measure.mean("exact match", shares)]
    if any(len(a.question.references) > 1 for a in answered):
        measures += [Measure.mean("with the majority", majority), Measure.mean("with any", any_of)]
    return measures


def free_score(by: str | None = None) -> Score:
    """For free answers that the paper gives to a judge: exact match, and the reference's words within the answer."""

    def score(answered: Sequence[Answered]) -> list[Measure]:
        exact = [vqa.matches(a.answer, a.question.references) for a in answered]
        within = [vqa.contains(a.answer, a.question.references) for a in answered]
        measures = [Measure.mean("exact match", exact), Measure.mean("contains", within)]
        return measures + (by_fact(answered, within, by) if by else [])

    return score


def cider_score(answered: Sequence[Answered]) -> list[Measure]:
    """Mean CIDEr-D. Its interval takes the rarity of n-grams, from the references of all, as given."""
    scores = cider([a.answer for a in answered], [a.question.references for a in answered])
    return [Measure.mean("CIDEr", scores)]


def choice_score(by: str | None = None, *, circular: bool = False) -> Score:
    """Accuracy of the option chosen, and the share of answers that name none or several; they are wrong.

    circular: questions that share ``facts["asked"]`` are one question with its options moved round. The accuracy is of
    the first of them; CircularEval counts a question that is right in every order.
    """

    def score(answered: Sequence[Answered]) -> list[Measure]:
        chosen = [choose(a.answer, a.question.options) for a in answered]
        right = [x is not None and x in a.question.references for x, a in zip(chosen, answered, strict=True)]
        first = [not circular or a.question.facts["first"] for a in answered]
        scored = [float(r) if f else None for r, f in zip(right, first, strict=True)]
        unparsed = [(x is None) if f else None for x, f in zip(chosen, first, strict=True)]
        measures = [Measure.mean("accuracy", scored)]
        if circular:
            always = _all_right([a.question.facts["asked"] for a in answered], right)
            measures.append(Measure.mean("CircularEval", always))
        measures.append(Measure.mean("unparsed", unparsed))
        return measures + (by_fact(answered, scored, by) if by else [])

    return score


def pope_score(answered: Sequence[Answered]) -> list[Measure]:
    """POPE's accuracy, precision, recall, F1 and share of yes, over all; F1 and accuracy by subset, and the mean F1 of
    the subsets. ``unclear``: the share of answers without a clear yes or no, which POPE's rule takes for yes."""
    said = np.array([pope_label(a.answer) == "yes" for a in answered])
    true = np.array(["yes" in a.question.references for a in answered])
    # [n, 4]: true and false positives, false and true negatives
    counts = np.stack([said & true, said & ~true, ~said & true, ~said & ~true], axis=1).astype(float)
    subsets = np.array([a.question.facts["subset"] for a in answered])
    names = list(dict.fromkeys(subsets.tolist()))
    one_hot = (subsets[:, None] == np.array(names)).astype(float)
    by_subset = (one_hot[:, :, None] * counts[:, None]).reshape(len(answered), -1)

    def mean_f1(sums: np.ndarray) -> np.ndarray:
        return _f1(sums.reshape(*sums.shape[:-1], len(names), 4)).mean(axis=-1)

    return [
        Measure("mean F1", by_subset, mean_f1),
        Measure("accuracy", counts, lambda s: (s[..., 0] + s[..., 3]) / s.sum(axis=-1)),
        Measure("precision", counts, lambda s: _share(s[..., 0], s[..., 0] + s[..., 1])),
        Measure("recall", counts, lambda s: _share(s[..., 0], s[..., 0] + s[..., 2])),
        Measure("F1", counts, _f1),
        Measure("yes", counts, lambda s: (s[..., 0] + s[..., 1]) / s.sum(axis=-1)),
        Measure.mean("unclear", [yes_or_no(a.answer) is None for a in answered]),
        *(Measure(f"F1: {name}", counts * one_hot[:, [i]], _f1) for i, name in enumerate(names)),
    ]


def by_fact(answered: Sequence[Answered], scores: Sequence[float | None], fact: str) -> list[Measure]:
    """The mean of each value of a fact, in the order in which they come."""
    values = [str(a.question.facts[fact]) for a in answered]
    return [
        Measure.mean(f"{fact}: {name}", [s if v == name else None for s, v in zip(scores, values, strict=True)])
        for name in dict.fromkeys(values)
    ]


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """0 where there is nothing to share."""
    return np.divide(part, whole, out=np.zeros_like(np.asarray(part, float)), where=np.asarray(whole) > 0)


def _f1(sums: np.ndarray) -> np.ndarray:
    return _share(2 * sums[..., 0], 2 * sums[..., 0] + sums[..., 1] + sums[..., 2])


def _all_right(asked: Sequence[Hashable], right: Sequence[bool]) -> list[float | None]:
    """At the first of the rows of each question, whether all of them are right."""
    rows = defaultdict(list)
    for row, name in enumerate(asked):
        rows[name].append(row)
    scores: list[float | None] = [None] * len(asked)
    for group in rows.values():
        scores[group[0]] = float(all(right[row] for row in group))
    return scores
