"""The language model's deployment: tasks with soft tokens in, outputs of the engine out."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import numpy as np
import torch

from serve.calls import Started, Task
from serve.metrics import LanguageMetrics
from unimoe_ray.config import parse
from unimoe_ray.data.prompt import encode_prompt
from unimoe_ray.data.schema import Media, Sample
from unimoe_ray.inference.async_engine import AsyncEngine
from unimoe_ray.inference.engine import Engine
from unimoe_ray.inference.request import Admitted, GenerationRequest, Output
from unimoe_ray.training.checkpoint import load_model

logger = logging.getLogger("ray.serve")
METRICS_INTERVAL_S = 1.0


class LanguageModel:
    """One engine per replica, in a thread of its own."""

    def __init__(self, config: dict, model_dir: str):
        run = parse(config)
        serving = run.serving
        threads = serving.engine.threads
        torch.set_num_threads(max(1, int(serving.language.num_cpus)) if threads == "auto" else threads)
        model, info, self._tokenizer = load_model(Path(model_dir))
        on_gpu = bool(serving.language.num_gpus) and torch.cuda.is_available()
        in_bf16 = serving.engine.precision == "bf16" or (serving.engine.precision == "auto" and on_gpu)
        model.to("cuda" if on_gpu else "cpu", torch.bfloat16 if in_bf16 else torch.float32)
        self._engine = Engine(model, self._tokenizer, serving.engine)
        self._experts = tuple(info.model["moe"]["slots"]) if info.sparse else ()
        self._backend: AsyncEngine | None = None
        self._metrics = LanguageMetrics(self._experts)

    async def generate(self, task: Task, *soft_tokens: np.ndarray) -> AsyncIterator[Started | Output]:
        """``soft_tokens``: [M, H] of each media file, in the order of the placeholders. Raises RequestRefused."""
        sample = Sample("", "", task.turns, tuple(Media(kind, ()) for kind in task.kinds), {})
        # Not in the event loop: a long text takes seconds, in which no health check would be answered.
        ids = await asyncio.to_thread(encode_prompt, sample, self._tokenizer)
        request = GenerationRequest(task.request_id, ids, list(soft_tokens), task.params, task.alone)
        tokens, ended = 0, False
        try:
            async with aclosing(self._running().generate(request)) as items:
                async for item in items:
                    if isinstance(item, Admitted):
                        sizes = tuple(values.nbytes for values in soft_tokens)
                        yield Started(item.prompt_tokens, sizes, self._experts)
                    else:
                        tokens += len(item.token_ids)
                        yield item
            ended = True
        finally:
            logger.info(f"generated {tokens} tokens" if ended else f"left after {tokens} tokens: the slot is free")

    async def ready(self) -> dict:
        """Counters and gauges of the engine. Raises RuntimeError when it no longer runs."""
        backend = self._running()
        backend.check()
        return backend.stats() | {"pid": os.getpid()}

    async def check_health(self) -> None:
        self._running().check()

    def _running(self) -> AsyncEngine:
        """The backend belongs to the event loop of requests, in which the constructor does not run."""
        if self._backend is None:
            self._backend = AsyncEngine(self._engine)
            self._reporting = asyncio.create_task(self._report())
        return self._backend

    async def _report(self) -> None:
        engine = self._engine
        while True:
            await asyncio.sleep(METRICS_INTERVAL_S)
            queue, steps = (
                [seen.popleft() for _ in range(len(seen))] for seen in (engine.queue_seconds, engine.step_tokens)
            )
            self._metrics.update(engine.stats(), engine.expert_load.copy(), queue, steps)
