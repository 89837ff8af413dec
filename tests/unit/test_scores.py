"""Metrics against published, library-made or hand-computed values."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimoe_ray.evaluation.bias import Compared, performance_bias
from unimoe_ray.evaluation.choices import choose, options_in, pope_label, yes_or_no
from unimoe_ray.evaluation.cider import cider, tokenise
from unimoe_ray.evaluation.intervals import Measure, difference, interval, percentiles, resampled
from unimoe_ray.evaluation.vqa import contains, matches, normalise, normalise_textvqa, textvqa_accuracy, vqa_accuracy

# Values of github.com/GT-Vision-Lab/VQA's processPunctuation and processDigitArticle, at its revision of 2021.
OFFICIAL = [
    ("The dog's", "dog's"),
    ("dont", "don't"),
    ("couldnt've", "couldn't've"),
    ("two dogs, a cat", "2 dogs cat"),
    ("1,000 people", "1000 people"),
    ("3.5", "3.5"),
    ("U.S.", "us"),
    ("red-ish", "red ish"),
    ("red - ish", "red ish"),
    ("yes/no", "yes no"),
    ("None", "0"),
    ("An Apple.", "apple"),
    ("a", ""),
    ("what?!", "what"),
    ("somebody'd", "somebodyd"),
]


@pytest.mark.parametrize(("text", "expected"), OFFICIAL)
def test_normalisation_is_vqas(text, expected):
    assert normalise(text) == expected


def test_normalisation_of_textvqa():
    assert normalise_textvqa("Domino's, Pizza?") == "domino 's pizza"
    assert normalise("Domino's, Pizza?") == "domino's pizza"


@pytest.mark.parametrize(("hits", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten_people(hits, accuracy):
    """The published table: averaged over leaving out one of the ten; without that it would be 1/3, 2/3, 1."""
    others = [f"other {letter}" for letter in "bcdefghijk"]
    references = ["red"] * hits + others[: 10 - hits]
    slow = np.mean([min(1, sum(r == "red" for j, r in enumerate(references) if j != i) / 3) for i in range(10)])
    assert vqa_accuracy("Red.", references) == pytest.approx(accuracy if hits < 10 else 0.0)
    assert vqa_accuracy("red", references) == pytest.approx(accuracy) == pytest.approx(slow)
    assert textvqa_accuracy("Red?", references) == pytest.approx(accuracy)


def test_where_all_people_agree_nothing_is_normalised():
    assert vqa_accuracy("the red", ["red"] * 10) == 0.0
    assert vqa_accuracy("the red", ["red"] * 9 + ["blue"]) == 1.0
    assert textvqa_accuracy("the red", ["red"] * 10) == 1.0


def test_matches():
    assert matches("The two Dogs.", ["2 dogs"]) and not matches("dogs", ["2 dogs"])
    assert not matches("", ["a"]) and not matches("a", ["the"])
    assert contains("It is a long jump, I think", ["long jump"]) and not contains("longer jumps", ["long jump"])
    assert not contains("anything", ["a"])


# Of Stanford's PTBTokenizer 3.4.1 with pycocoevalcap's list of punctuation.
TREEBANK = [
    ("A high-pitched whistle, then birds sing.", "a high-pitched whistle then birds sing"),
    ("It's raining hard and thunder doesn't stop", "it 's raining hard and thunder does n't stop"),
    ("A man (or woman) is talking on the radio.", "a man -lrb- or woman -rrb- is talking on the radio"),
    (
        "someone's walking; the dog's barking at 10:30 p.m. in the U.S.",
        "someone 's walking the dog 's barking at 10:30 p.m. in the u.s.",
    ),
    ("Cars pass by... and a horn honks!", "cars pass by and a horn honks"),
    ("cannot hear anything but wind", "can not hear anything but wind"),
    ("A 3.5 inch drive spins up, 1,000 times", "a 3.5 inch drive spins up 1,000 times"),
    ("“quoted” words and 'single' quotes", "quoted words and single quotes"),
    ("a person is gonna run / walk", "a person is gon na run / walk"),
    ("Water drips -- slowly - into a bucket", "water drips slowly into a bucket"),
    ("bell rings at 5 o'clock", "bell rings at 5 o'clock"),
    ("sirens' wail", "sirens wail"),
    ("50% louder than $5 #1", "50 % louder than $ 5 # 1"),
]


@pytest.mark.parametrize(("caption", "expected"), TREEBANK)
def test_tokens_are_those_of_the_java_tokenizer(caption, expected):
    assert " ".join(tokenise(caption)) == expected


REFERENCES = [
    ["Rain falls hard on a tin roof.", "Heavy rain hits a metal roof", "It is raining on a roof"],
    ["A bird sings in a tree.", "Birds are chirping while wind blows", "A bird is chirping loudly"],
    ["A man's talking (loudly) on the radio", "Somebody speaks on the radio", "a man is speaking"],
    ["Cars pass by, and a horn honks!", "Traffic noise with a honking horn", "cars are driving on a road"],
]
ANSWERS = ["Rain falls on a metal roof", "A bird is chirping in a tree.", "a man is talking", ""]
# pycocoevalcap 1.2: Cider().compute_score of these after its PTBTokenizer
CIDER = [2.192346457079, 3.122838388533, 1.756825769644, 0.0]


def test_cider_is_pycocoevalcaps():
    assert cider(ANSWERS, REFERENCES) == pytest.approx(CIDER, abs=1e-9)


def test_cider_of_the_references_themselves_is_highest():
    same = cider([r[0] for r in REFERENCES], [[r[0]] for r in REFERENCES])
    assert same == pytest.approx([10.0] * 4)
    assert cider(["unheard of words"], [["a bird"]]) == [0.0]
    with pytest.raises(ValueError, match="none of them empty"):
        cider(["x"], [[]])


OPTIONS = ["a cat", "a dog", "the red car", "red"]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"),
        ("(b)", "B"),
        ("c.", "C"),
        ("**D**", "D"),
        ("B. a dog", "B"),
        ("B) a dog", "B"),
        ("Let me think.\nB. a dog", "B"),
        ("The answer is C.", "C"),
        ("Answer: (D)", "D"),
        ("the correct option is B", "B"),
        ("Option A is right", "A"),
        ("The answer is A cat", "A"),  # by its words
        ("It is a dog.", "B"),
        ("The red car", "C"),  # not D, which is part of it
        ("red", "D"),
        ("I think B", "B"),
        ("It's D", "D"),
        ("A or B", None),
        ("(A) and (B)", None),
        ("A. a cat\nB. a dog", None),
        ("The answer is B, not C", None),
        ("a dog or a cat", None),
        ("A man", None),
        ("I, too", None),
        ("E", None),
        ("", None),
        ("neither", None),
    ],
)
def test_choice(answer, letter):
    assert choose(answer, OPTIONS) == letter


def test_options_in_a_question():
    assert options_in("Which?\nA. x y\nB) z\n(C) w\nAnswer") == ("x y", "z", "w")
    assert options_in("B. x\nC. y") == () == options_in("Which?")


def test_yes_and_no():
    answers = ["Yes.", "No, it is not", "yes and no", "maybe", "There isn't one. Yes", "Yes, there is"]
    assert [yes_or_no(answer) for answer in answers] == ["yes", "no", None, None, "no", "yes"]
    assert [pope_label(answer) for answer in ("maybe", "No, sir", "It is not. Yes", "no", "NO")] == [
        *("yes", "no", "no", "no", "yes")
    ]


def test_the_interval_of_a_mean_is_the_normal_one():
    """The bootstrap's standard error of a mean is the sample's (with n, not n - 1) over the root of n."""
    scores = np.random.default_rng(0).normal(0.5, 0.2, 400)
    measure = Measure.mean("x", scores.tolist())
    found = interval(measure, range(400), resamples=4000)
    error = scores.std() / math.sqrt(400)
    assert measure.figure == pytest.approx(scores.mean())
    assert found.low == pytest.approx(scores.mean() - 1.96 * error, abs=error / 8)
    assert found.high == pytest.approx(scores.mean() + 1.96 * error, abs=error / 8)
    assert interval(measure, range(400)) == interval(measure, range(400))
    assert interval(measure, range(400)) != interval(measure, range(400), seed=1)


def test_questions_of_a_group_are_drawn_together():
    """Ten copies of each score say no more than one of each."""
    scores = np.random.default_rng(1).integers(0, 2, 60).astype(float)
    alone = resampled([Measure.mean("x", scores).sums], range(60), Measure.mean("x", scores).value)
    copied = Measure.mean("x", np.repeat(scores, 10))
    together = resampled([copied.sums], np.repeat(np.arange(60), 10).tolist(), copied.value)
    apart = resampled([copied.sums], range(600), copied.value)
    assert together.std() == pytest.approx(scores.std() / math.sqrt(60), rel=0.08)
    assert alone.std() == pytest.approx(together.std(), rel=0.08)
    assert apart.std() == pytest.approx(together.std() / math.sqrt(10), rel=0.08)


def test_left_out_scores_have_no_part():
    measure = Measure.mean("x", [1.0, None, 0.0, None])
    assert (measure.figure, measure.count) == (0.5, 2)
    assert math.isnan(Measure.mean("x", [None]).figure)
    nothing = interval(Measure.mean("x", [None, None]), "ab")
    assert math.isnan(nothing.low) and math.isnan(nothing.high)


def test_differences_are_paired():
    """Two models that differ on one question in ten, always for the better: far surer than two separate intervals."""
    rng = np.random.default_rng(2)
    first = rng.integers(0, 2, 500).astype(float)
    second = np.where(rng.random(500) < 0.1, 1.0, first)
    a, b = Measure.mean("x", second.tolist()), Measure.mean("x", first.tolist())
    value, found = difference(a, b, range(500))
    assert value == pytest.approx((second - first).mean())
    error = (second - first).std() / math.sqrt(500)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert found.low > 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
@settings(max_examples=25, deadline=None)
def test_an_interval_holds_between_the_extremes(scores):
    found = interval(Measure.mean("x", scores), range(len(scores)), resamples=50)
    assert min(scores) - 1e-9 <= found.low <= found.high <= max(scores) + 1e-9


def test_performance_bias_by_hand():
    """Specialists 0.8, 0.6, 1.0; the model 0.7, 0.8, 0.5: drops 0.1, -0.2, 0.5."""

    def share(part, whole=10):
        return Measure.mean("accuracy", [1.0] * part + [0.0] * (whole - part))

    compared = {
        "image": Compared(share(8), share(7), range(10)),
        "speech": Compared(share(6), share(8), range(10)),
        "sound": Compared(share(10), share(5), range(10)),
    }
    found = performance_bias(compared, resamples=200)
    assert found.drops == pytest.approx({"image": 0.1, "speech": -0.2, "sound": 0.5})
    assert found.mean == pytest.approx(0.4 / 3)
    assert (found.worst, found.worst_modality) == (pytest.approx(0.5), "sound")
    assert found.spread == pytest.approx(
        math.sqrt(((0.1 - 0.4 / 3) ** 2 + (-0.2 - 0.4 / 3) ** 2 + (0.5 - 0.4 / 3) ** 2) / 3)
    )
    assert set(found.intervals) == {"image", "speech", "sound", "mean", "worst", "spread"}
    assert found.intervals["sound"].low < 0.5 < found.intervals["sound"].high
    with pytest.raises(ValueError, match="the same questions"):
        performance_bias({"image": Compared(share(8), share(3, 5), range(10))})
    with pytest.raises(ValueError, match="no modalities"):
        performance_bias({})


def test_a_model_that_is_the_specialist_has_no_bias():
    same = Measure.mean("accuracy", [1.0, 0.0, 1.0])
    found = performance_bias({"image": Compared(same, same, "abc")}, resamples=50)
    assert (found.mean, found.worst, found.spread) == (0.0, 0.0, 0.0)
    assert found.intervals["image"] == percentiles(np.zeros(5))
