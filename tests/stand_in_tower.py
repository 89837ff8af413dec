"""A tower without weights whose features tell the file apart, and which notes everything that it encodes; pictures for
it, and their preparation."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.tiny import tiny_config
from unimoe_ray.config.data import SourceConfig
from unimoe_ray.data import prepare as preparing
from unimoe_ray.data.encode import EncodeSettings
from unimoe_ray.data.samples import Source
from unimoe_ray.model.features import Features


class StandInTower:
    """Features [1, 4, 12] of a picture are its pixels at 4 x 4. Each one takes ``seconds``; once the log has ``stop``
    lines, nothing goes on."""

    name, modality, feature_dim = "stand-in", "image", 12

    def __init__(self, log: Path, seconds: float = 0.0, stop: int | None = None):
        self.log, self.seconds, self.stop = log, seconds, stop

    def preprocess(self, media: Image.Image) -> np.ndarray:
        return np.asarray(media.resize((4, 4)), np.float32).reshape(1, 4, 12)

    def tokens_for(self, media: Image.Image) -> list[int]:
        return [4]

    def __call__(self, batch: list[np.ndarray]) -> Features:
        for windows in batch:
            with open(self.log, "a") as log:
                log.write(f"{os.getpid()} {zlib.crc32(windows)}\n")
            time.sleep(self.seconds)
            while self.stop is not None and len(encodings(self.log)) >= self.stop:
                time.sleep(0.1)
        values = torch.from_numpy(np.concatenate(batch))
        count = torch.arange(len(values))
        return Features(values, torch.full_like(count, 4), count)


def encodings(log: Path) -> list[tuple[int, int]]:
    """(process, picture) of everything that was encoded, in order."""
    if not log.exists():
        return []
    return [(int(pid), int(crc)) for pid, crc in (line.split() for line in log.read_text().splitlines())]


def repeats(log: Path) -> int:
    """Encodings of pictures that had been encoded before."""
    return sum(Counter(crc for _, crc in encodings(log)).values()) - len({crc for _, crc in encodings(log)})


def pictures(folder: Path, count: int, first: int = 0) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = []
    for seed in range(first, first + count):
        paths.append(folder / f"{seed}.png")
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(paths[-1])
    return paths


class StandInJob:
    """A preparation of pictures for training, and of some for testing."""

    def __init__(
        self, root: Path, name: str, paths: list[Path], seconds: float = 0.0, held_out: Sequence[Path] = (), **data
    ):
        root.mkdir(exist_ok=True)
        self.config = tiny_config(root, name=name, data={"encode_batch": 8, **data})
        self.log, self.said = root / "log", []
        self.sources = []
        for split, files in {"train": paths, "test": held_out}.items():
            turns = [{"from": "human", "value": "<image> x?"}, {"from": "gpt", "value": "yes"}]
            records = [{"id": p.stem, "task": "look", "image": str(p), "conversations": turns} for p in files]
            path = root / f"{name}-{split}.json"
            path.write_text(json.dumps(records))
            self.sources.append(SourceConfig(path=str(path), split=split))
        tower = partial(StandInTower, self.log, seconds)
        self.settings = EncodeSettings(
            str(root / "features"), {"image": "tower"}, 2, self.config.data, lambda _: tower()
        )
        self.folder = self.settings.partition("image")

    def prepare(self, workers: int = 1) -> preparing.Prepared:
        soft_tokens, show = lambda _, lengths: sum(lengths), lambda *_: None  # noqa: E731
        return preparing.prepare(self.config, self.sources, self.settings, soft_tokens, workers, show, self.said.append)

    def source(self, split: str) -> Source:
        return preparing.source(self.config, split, self.settings)
