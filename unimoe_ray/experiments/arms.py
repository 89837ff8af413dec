"""The grid: each arm is a way to make the final model out of a seed's common stages, as changes of a configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from unimoe_ray.config import Config, parse

Tree = dict[str, Any]
Change = Callable[[Tree], None]
Groups = Mapping[str, tuple[str, ...]]

# The mini suite's tasks by the modality whose specialist answers them; a task that needs two belongs to the rarer one.
MINI_GROUPS: Groups = {
    "image": ("image_vqa", "fashion"),
    "video": ("video_direction", "video_object"),
    "speech": ("spoken_word", "spoken_question"),
    "audio": ("sound_event", "video_sound"),
}
# Arms that are read side by side, with short names.
FAMILIES: Mapping[str, Mapping[str, str]] = {
    "Dense and mixtures": {"dense": "dense", "experts-top1": "top-1", "experts": "top-2", "copies": "copies"},
    "As many steps in all": {"experts": "experts", "copies-long": "copies, long", "dense-long": "dense, long"},
    "Experts and copies": {"experts": "experts", "copies": "copies", "copies-top1": "top-1 copies"},
    "Number of experts": {"experts-2": "2", "experts": "4", "experts-8": "8"},
    "Balance loss": {
        "experts": "experts",
        "experts-balance": "experts, on",
        "copies": "copies",
        "copies-balance": "copies, on",
    },
    "Layers with experts": {
        "experts": "all",
        "experts-interval": "every other",
        "experts-first": "first half",
        "experts-second": "second half",
    },
    "Rare speech": {
        "dense": "dense",
        "dense-rare": "dense, rare",
        "experts-top1": "top-1",
        "experts-top1-rare": "top-1, rare",
    },
}
RARE = 0.05
BALANCE = 0.01


@dataclass(frozen=True)
class Arm:
    """``changes`` of stage 3, in order; base, align and experts are those of the seed, whatever the arm."""

    name: str
    about: str
    changes: tuple[Change, ...] = ()


def dense(tree: Tree) -> None:
    """One feed-forward for everything: no experts, no router."""
    tree["model"]["moe"]["layers"] = "none"
    tree["stages"]["tune"]["tune"]["train"].pop("router", None)


def moe(**settings: Any) -> Change:
    def change(tree: Tree) -> None:
        tree["model"]["moe"] |= settings

    return change


def twice_the_slots(tree: Tree) -> None:
    tree["model"]["moe"]["slots"] *= 2


def two_slots(tree: Tree) -> None:
    tree["model"]["moe"]["slots"] = tree["model"]["moe"]["slots"][1:3]


def longer(tree: Tree) -> None:
    """As many steps more as stage 2 took in all: what experts had before."""
    tree["stages"]["tune"]["tune"]["steps"] += sum(run["steps"] for run in tree["stages"]["experts"].values())


def only(tasks: tuple[str, ...]) -> Change:
    """Trained on these tasks alone, for as many steps."""

    def change(tree: Tree) -> None:
        run = tree["stages"]["tune"]["tune"]
        run["tasks"] = {task: weight for task, weight in run["tasks"].items() if task in tasks}

    return change


def rare(tasks: tuple[str, ...], share: float = RARE) -> Change:
    """These tasks together make up ``share`` of the mixture; the others keep their proportions."""

    def change(tree: Tree) -> None:
        weights = tree["stages"]["tune"]["tune"]["tasks"]
        mine = sum(weight for task, weight in weights.items() if task in tasks)
        others = sum(weights.values()) - mine
        factor = share / (1 - share) * others / mine
        for task in weights.keys() & set(tasks):
            weights[task] *= factor

    return change


def grid(groups: Groups = MINI_GROUPS, scarce: str = "speech") -> dict[str, Arm]:
    """All arms by name. Of equal active FLOPs: ``dense``, the specialists, and the mixtures with top-1. Experts had
    stage 2 before: of as many steps in all are the arms that end in ``-long``."""
    copies = moe(init="copies")
    arms = [
        Arm("dense", "one dense model, mixed data", (dense,)),
        *(
            Arm(f"specialist-{name}", f"one dense model, {name} alone", (dense, only(tasks)))
            for name, tasks in groups.items()
        ),
        Arm("dense-long", "dense, with the steps of stage 2 on top", (dense, longer)),
        Arm("experts", "4 experts of stage 2, top-2"),
        Arm("copies-long", "4 copies, with the steps of stage 2 on top", (copies, longer)),
        Arm("copies", "4 copies of the base, top-2", (copies,)),
        Arm("experts-top1", "4 experts, top-1", (moe(top_k=1),)),
        Arm("copies-top1", "4 copies, top-1", (copies, moe(top_k=1))),
        Arm("experts-2", "2 experts, top-2: both always", (two_slots,)),
        Arm("experts-8", "8 experts, each of the 4 twice, top-2", (twice_the_slots,)),
        Arm("experts-balance", f"4 experts, balance loss {BALANCE:g}", (moe(balance_coef=BALANCE),)),
        Arm("copies-balance", f"4 copies, balance loss {BALANCE:g}", (copies, moe(balance_coef=BALANCE))),
        Arm("experts-interval", "experts in every other layer", (moe(layers="interval"),)),
        Arm("experts-first", "experts in the first half of the layers", (moe(layers="first_half"),)),
        Arm("experts-second", "experts in the second half of the layers", (moe(layers="second_half"),)),
        Arm("dense-rare", f"dense, {scarce} at {RARE:.0%}", (dense, rare(groups[scarce]))),
        Arm("experts-top1-rare", f"4 experts, top-1, {scarce} at {RARE:.0%}", (moe(top_k=1), rare(groups[scarce]))),
    ]
    return {arm.name: arm for arm in arms}


def arm_config(base: Config, arm: Arm, seed: int, out: str) -> Config:
    """The configuration of one run. Its run folder is ``OUT/ARM-sSEED``."""
    tree = base.model_dump(mode="json") | {"name": f"{arm.name}-s{seed}", "runs_dir": out, "seed": seed}
    tree["mini"]["suite_seed"] = base.suite_seed
    tree["training"]["workers"] = 1
    for change in arm.changes:
        change(tree)
    return parse(tree)


def trunk_config(base: Config, seed: int, out: str) -> Config:
    """What all runs of a seed begin with: base, align and experts."""
    tree = base.model_dump(mode="json") | {"name": f"trunk-s{seed}", "runs_dir": out, "seed": seed}
    tree["mini"]["suite_seed"] = base.suite_seed
    return parse(tree)
