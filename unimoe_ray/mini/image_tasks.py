"""Pictures: image_vqa, caption_image and fashion."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from unimoe_ray.errors import UnimoeError
from unimoe_ray.mini.example import SPLITS, Count, Example, Split, draw, stream
from unimoe_ray.mini.questions import Picture, conversations, read_pictures
from unimoe_ray.mini.render import read_idx, write_grey

DEV_PICTURES = 300
GARMENTS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


def split_pictures(folder: Path, train_pictures: int) -> dict[str, list[Picture]]:
    """easy-VQA's pictures: the last 300 of its training split are our dev split, at most ``train_pictures`` of the
    others our training split; its test split is ours."""
    official, test = read_pictures(folder / "train"), read_pictures(folder / "test")
    if len(official) <= DEV_PICTURES:
        raise UnimoeError(f"{folder}: {len(official)} training pictures; more than {DEV_PICTURES} are needed")
    train, dev = official[:-DEV_PICTURES], official[-DEV_PICTURES:]
    return {"train": train[:train_pictures], "dev": dev, "test": test}


def media_path(out: Path, split: str, picture: Picture) -> str:
    """The picture's path relative to the suite; copied there when first asked for."""
    path = f"media/image/easy_vqa_{split}_{int(picture.path.stem):04d}.png"
    if not (out / path).exists():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture.path, out / path)
    return path


def image_examples(out: Path, pictures: dict[str, list[Picture]], seed: int, sizes: Count, captions_dev: int) -> Split:
    """image_vqa: in training ``sizes.train`` questions in conversations of one to three, spread over all pictures; in
    dev and test one question to a picture, of the official distribution. caption_image in train and dev."""
    result: Split = {split: [] for split in SPLITS}
    train = pictures["train"]
    for number, picture in enumerate(train):
        rounds = (number + 1) * sizes.train // len(train) - number * sizes.train // len(train)
        for turns in conversations(picture, rounds, stream(seed, "train", "image_vqa", number)):
            result["train"].append(_about(out, "train", picture, "image_vqa", turns))
    for split, count in (("dev", sizes.dev), ("test", sizes.test)):
        rng = stream(seed, split, "image_vqa")
        for picture in draw(pictures[split], count, rng):
            result[split].append(_about(out, split, picture, "image_vqa", (rng.choice(picture.turns),)))
    for split, count in (("train", len(train)), ("dev", captions_dev)):
        for picture in [picture for picture in pictures[split] if picture.content][:count]:
            turn = ("describe the image", f"a {' '.join(picture.content)}")
            result[split].append(_about(out, split, picture, "caption_image", (turn,)))
    return result


def _about(out: Path, split: str, picture: Picture, task: str, turns: tuple[tuple[str, str], ...]) -> Example:
    content = (picture.content,) if picture.content else None
    return Example(task, turns, (("image", media_path(out, split, picture)),), content)


def fashion_examples(out: Path, folder: Path, seed: int, sizes: Count) -> Split:
    """fashion (official test split; dev out of the training split's last 5,000), and caption_image in train."""
    grey, labels = {}, {}
    for name in ("train", "t10k"):
        grey[name] = read_idx(folder / f"{name}-images-idx3-ubyte.gz")
        labels[name] = read_idx(folder / f"{name}-labels-idx1-ubyte.gz")
        if grey[name].ndim != 3 or len(grey[name]) != len(labels[name]) or labels[name].max(initial=0) > 9:
            raise UnimoeError(f"{folder}: the {name} files are not Fashion-MNIST")
    cut = len(grey["train"]) - 5000
    sources = {"train": ("train", 0, cut), "dev": ("train", cut, cut + 5000), "test": ("t10k", 0, len(grey["t10k"]))}
    result: Split = {split: [] for split in SPLITS}
    for split, count in zip(SPLITS, sizes, strict=True):
        name, first, last = sources[split]
        rng = stream(seed, split, "fashion")
        for number in draw(range(first, last), count, rng):
            result[split] += _garment(out, split, grey[name][number], int(labels[name][number]), number, rng)
    return result


def _garment(out: Path, split: str, grey: np.ndarray, label: int, number: int, rng) -> list[Example]:
    path = f"media/image/fashion_{split}_{number:05d}.png"
    write_grey(out / path, grey)
    garment = GARMENTS[label]
    seen = {"media": (("image", path),), "content": ((garment,),)}
    question = rng.choice(("what is this", "which clothing item is shown"))
    examples = [Example("fashion", ((question, garment),), **seen)]
    if split == "train":
        examples.append(Example("caption_image", (("describe the image", f"a photo of a {garment}"),), **seen))
    return examples
