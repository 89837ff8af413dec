"""The encoder deployments: a frozen tower with its connectors, from media bytes to soft tokens."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ray import serve

from serve.calls import MediaFile, MediaRefused
from serve.metrics import EncoderMetrics
from serve.suspects import Gate
from serve.tracing import Tracer
from unimoe_ray.config import parse
from unimoe_ray.config.data import DataConfig
from unimoe_ray.config.serving import EncoderConfig
from unimoe_ray.data.features import TOWER_OF, decode_media, encode_windows
from unimoe_ray.data.media import SAMPLE_RATE, BadMedia, MediaBytes
from unimoe_ray.data.schema import Media
from unimoe_ray.inference.soft_tokens import soft_tokens
from unimoe_ray.towers import load_tower
from unimoe_ray.training.checkpoint import check_tower, load_connectors

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Prepared:
    """A decoded file. windows: the tower's input [W, ...]; cost: frames or seconds, at most a batch's."""

    kind: str
    windows: np.ndarray
    cost: int
    arrived: float


def _cost(batch: list[Prepared]) -> int:
    return sum(item.cost for item in batch)


class Encoder:
    """``tower``: image (videos too), speech or audio. Files are decoded side by side, then go through the tower and
    their connector in batches bounded by cost."""

    def __init__(self, config: dict, model_dir: str, tower: str):
        run = parse(config)
        serving = run.serving
        settings: EncoderConfig = getattr(serving, tower)
        self._kinds = [kind for kind, name in TOWER_OF.items() if name == tower]
        folder = Path(model_dir)
        self._device = "cuda" if settings.num_gpus and torch.cuda.is_available() else "cpu"
        torch.set_num_threads(max(1, int(settings.num_cpus)))
        self._tower = load_tower(run, tower).to(self._device)
        self._connectors, info = load_connectors(folder, self._kinds)
        self._connectors.to(self._device)
        for kind in self._kinds:
            check_tower(folder, info, kind, self._tower)
        self._frames = run.model.video.frames
        self._max_positions = run.model.language.max_positions
        self._limits = serving.limits
        self._max_cost = settings.max_batch_cost
        self._batched.set_max_batch_size(settings.max_batch_cost)
        self._batched.set_batch_wait_timeout_s(settings.batch_wait_s)
        self._decoding = ThreadPoolExecutor(4, thread_name_prefix="decode")
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._gate = Gate()
        self._metrics = EncoderMetrics()
        self._tracer = Tracer(serving.tracing, tower)

    async def encode(self, file: MediaFile) -> np.ndarray:
        """Soft tokens [M, H]. Raises MediaRefused naming the request part."""
        if file.kind not in self._kinds:
            raise ValueError(f"{file.kind} is not encoded here; allowed: {', '.join(self._kinds)}")
        with self._tracer.span("encode", file.trace, kind=file.kind) as span:
            values = await self._encoded(file)
            span.set_attribute("soft_tokens", len(values))
        return values

    async def _encoded(self, file: MediaFile) -> np.ndarray:
        arrived = time.monotonic()
        loop = asyncio.get_running_loop()
        async with self._gate.enter(file.alone):
            windows, cost = await loop.run_in_executor(self._decoding, self._prepare, file)
            item = Prepared(file.kind, windows, min(cost, self._max_cost), arrived)
            if file.alone:
                values = (await loop.run_in_executor(self._encoding, self._encode, [item]))[0]
            else:
                values = await self._batched(item)
        logger.info(f"encoded {file.kind} {len(values)} soft tokens in {time.monotonic() - arrived:.3f} s")
        return values

    @serve.batch(batch_size_fn=_cost)
    async def _batched(self, items: list[Prepared]) -> list[np.ndarray]:
        return await asyncio.get_running_loop().run_in_executor(self._encoding, self._encode, items)

    def _prepare(self, file: MediaFile) -> tuple[np.ndarray, int]:
        """The tower's input windows and the cost of a file."""
        is_video = file.kind == "video"
        bounds = DataConfig(
            max_pixels=self._limits.max_video_pixels if is_video else self._limits.max_pixels,
            max_seconds=self._limits.max_seconds,
        )
        try:
            decoded = decode_media(Media(file.kind, (MediaBytes(file.data, file.name),)), self._frames, bounds)
        except BadMedia as error:
            raise MediaRefused(str(error)) from None
        soft = self._connectors[file.kind].soft_tokens(self._tower.tokens_for(decoded))
        if soft >= self._max_positions:
            raise MediaRefused(f"{file.name}: becomes {soft} tokens; the model's context is {self._max_positions}")
        windows = self._tower.preprocess(decoded)
        cost = len(windows) if file.kind in ("image", "video") else -(-len(decoded) // SAMPLE_RATE)
        return windows, max(1, cost)

    def _encode(self, items: list[Prepared]) -> list[np.ndarray]:
        begun = time.monotonic()
        features = encode_windows(self._tower, [item.windows for item in items])
        done: list[np.ndarray | None] = [None] * len(items)
        for kind in self._kinds:
            rows = [row for row, item in enumerate(items) if item.kind == kind]
            if rows:
                values = soft_tokens(self._connectors[kind], kind, [features[row] for row in rows])
                for row, value in zip(rows, values, strict=True):
                    done[row] = value
        self._metrics.encoded([item.kind for item in items])
        self._metrics.batch_files.observe(len(items))
        self._metrics.batch_cost.observe(_cost(items))
        self._metrics.seconds.observe(time.monotonic() - begun)
        for item in items:
            self._metrics.queue.observe(begun - item.arrived)
        return done
