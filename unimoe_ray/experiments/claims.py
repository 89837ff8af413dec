"""The claims of the paper, as differences between arms, with the paper's own figures for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from unimoe_ray.experiments.arms import Groups
from unimoe_ray.experiments.figures import steps_to_90, worst_drop
from unimoe_ray.experiments.outcomes import Seed

# Per cent, as published (arXiv 2405.11273, single runs). Table 7, one epoch of MoE-Task2: A-OKVQA, OK-VQA,
# ActivityNet-QA, RACE middle and high.
TOP_1, TOP_2 = (66.46, 62.76, 42.1, 45.13, 42.42), (66.20, 63.02, 42.8, 46.31, 43.71)
ONE_EXPERT, TWO_EXPERTS = (65.68, 56.12, 41.6, 42.59, 39.02), (65.75, 62.04, 42.9, 44.64, 43.63)
INTERVAL = (64.54, 61.77, 43.3, 46.17, 46.60)
FIRST_HALF, SECOND_HALF = (65.68, 60.96, 41.9, 38.16, 41.14), (63.97, 61.33, 43.2, 51.39, 52.69)
# Table 8: A-OKVQA, OK-VQA, ActivityNet-QA, Clotho v2.
STAGE_2, STAGE_2_BALANCED = (66.20, 63.20, 42.7, 24.7), (65.23, 61.92, 42.9, 24.3)
COPIES, COPIES_BALANCED = (64.98, 61.67, 42.1, 21.5), (65.76, 61.99, 41.9, 24.2)
# Table 9: A-OKVQA, OK-VQA, VQAv2, MMBench, POPE, SEED, MM-Vet, RACE middle and high, listening long and short,
# ActivityNet-QA.
FOUR = (70.22, 66.02, 76.4, 73.2, 86.0, 63.4, 32.6, 64.21, 64.72, 48.00, 58.67, 45.6)
EIGHT = (70.0, 66.2, 76.6, 73.0, 86.2, 63.3, 32.5, 63.75, 61.56, 48.67, 46.0, 46.0)
# Tables 5 (A-OKVQA, OK-VQA, VQAv2, MMBench) and 3 (RACE middle and high, listening long and short).
IMAGE = {
    "specialist": (67.07, 62.91, 75.18, 71.26),
    "dense": (58.69, 57.77, 68.74, 67.53),
    "mixture": (61.22, 57.63, 68.42, 68.15),
}
SPEECH = {
    "specialist": (46.80, 48.74, 34.67, 46.00),
    "dense": (32.59, 29.02, 18.67, 8.00),
    "mixture": (47.08, 47.08, 41.33, 36.00),
}


@dataclass(frozen=True)
class Paper:
    """Where the paper shows a claim; difference: its own, in points (mean over the benchmarks), if it has figures."""

    where: str
    difference: float | None = None


@dataclass(frozen=True)
class Claim:
    """``arms`` that it needs; ``difference`` of one seed, above 0 where the claim holds; unit: points of accuracy
    (shares of 1) or steps."""

    name: str
    text: str
    arms: tuple[str, ...]
    difference: Callable[[Seed], float]
    paper: Paper
    unit: str = "points"


def claims(groups: Groups, scarce: str = "speech") -> list[Claim]:
    """The paper's, for the arms of ``arms.grid``. A mixture and a dense model are compared at equal active FLOPs, at
    equal steps of stage 3, and once more at equal steps in all."""

    def better(name: str, text: str, first: str, second: str, paper: Paper) -> Claim:
        return Claim(name, text, (first, second), lambda s: s[first].accuracy() - s[second].accuracy(), paper)

    specialists = tuple(f"specialist-{name}" for name in groups)
    rare_arms = ("dense", "dense-rare", "experts-top1", "experts-top1-rare")

    def rare_gain(seed: Seed) -> float:
        lost = [
            seed[arm].accuracy(groups[scarce]) - seed[f"{arm}-rare"].accuracy(groups[scarce]) for arm in rare_arms[::2]
        ]
        return lost[0] - lost[1]

    seven, eight = "table 7, mean of 5", "table 8, mean of 4"
    return [
        better(
            "mixture",
            "a mixture of experts beats one dense model of equal active FLOPs",
            "experts-top1",
            "dense",
            _points(
                "table 7, mean of 5: top-1 of 4 and one expert, which seems to start from LLaMA (table 8)",
                TOP_1,
                ONE_EXPERT,
            ),
        ),
        Claim(
            "bias",
            "a mixture's worst drop behind a modality's specialist is smaller than a dense model's",
            ("experts-top1", "dense", *specialists),
            lambda s: worst_drop(s, "dense", groups) - worst_drop(s, "experts-top1", groups),
            Paper("tables 3 and 5, Task 6 and MoE-Task 1", _paper_drop("dense") - _paper_drop("mixture")),
        ),
        Claim(
            "rare",
            f"where {scarce} is rare in training, a mixture loses less on it than a dense model",
            rare_arms,
            rare_gain,
            Paper("argued; no experiment varies the share"),
        ),
        better(
            "mixture, all steps",
            "a mixture beats a dense model of equal active FLOPs and as many steps in all",
            "experts-top1",
            "dense-long",
            Paper("not compared"),
        ),
        better(
            "stage 2",
            "experts of stage 2 beat copies of the base",
            "experts",
            "copies",
            _points(eight, STAGE_2, COPIES),
        ),
        better(
            "stage 2, all steps",
            "experts of stage 2 beat copies of as many steps in all",
            "experts",
            "copies-long",
            Paper("not compared"),
        ),
        Claim(
            "speed",
            "experts of stage 2 need fewer steps than copies to nine tenths of the final loss",
            ("experts", "copies"),
            lambda s: steps_to_90(s["copies"].losses) - steps_to_90(s["experts"].losses),
            Paper("no figure in its tables"),
            "steps",
        ),
        better("4 experts", "four experts beat two", "experts", "experts-2", _points(seven, TOP_2, TWO_EXPERTS)),
        better(
            "8 experts", "eight experts beat four", "experts-8", "experts", _points("table 9, mean of 12", EIGHT, FOUR)
        ),
        better("top-2", "top-2 beats top-1", "experts", "experts-top1", _points(seven, TOP_2, TOP_1)),
        better(
            "balance",
            "a balance loss harms pre-tuned experts",
            "experts",
            "experts-balance",
            _points(eight, STAGE_2, STAGE_2_BALANCED),
        ),
        better(
            "balance of copies",
            "a balance loss helps identical experts",
            "copies-balance",
            "copies",
            _points(eight, COPIES_BALANCED, COPIES),
        ),
        better(
            "interval",
            "experts in all layers beat every other layer",
            "experts",
            "experts-interval",
            _points(seven, TOP_2, INTERVAL),
        ),
        better(
            "first half",
            "experts in all layers beat the first half",
            "experts",
            "experts-first",
            _points(seven, TOP_2, FIRST_HALF),
        ),
        better(
            "second half",
            "experts in all layers beat the second half",
            "experts",
            "experts-second",
            _points(seven, TOP_2, SECOND_HALF),
        ),
    ]


def _points(where: str, first: tuple[float, ...], second: tuple[float, ...]) -> Paper:
    return Paper(where, round(fmean(first) - fmean(second), 2))


def _paper_drop(model: str) -> float:
    """The worst of the paper's drops behind its specialists, on images with text and on long speech."""
    return round(max(fmean(of["specialist"]) - fmean(of[model]) for of in (IMAGE, SPEECH)), 2)
