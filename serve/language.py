"""The language model's deployment: tasks with soft tokens in, outputs of the engine out."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch

from serve import experts
from serve.calls import MediaFile, Started, Task, Told
from serve.metrics import LanguageMetrics
from serve.priority import give_way
from serve.tracing import Tracer
from unimoe_ray.config import parse
from unimoe_ray.data.features import TOWER_OF
from unimoe_ray.data.schema import Media, Sample
from unimoe_ray.data.shorten import shorten
from unimoe_ray.inference.async_engine import AsyncEngine
from unimoe_ray.inference.engine import Engine
from unimoe_ray.inference.request import Admitted, Backend, EngineStopped, GenerationRequest
from unimoe_ray.inference.vllm_engine import VllmEngine
from unimoe_ray.training.checkpoint import WEIGHTS, load_model

if TYPE_CHECKING:
    from serve.encoders import Encoder

logger = logging.getLogger("ray.serve")
METRICS_INTERVAL_S = 1.0
# Characters that take less time to encode than it takes to hand them to a thread and back.
SHORT = 2000


class LanguageModel:
    """One engine per replica, in a thread of its own."""

    def __init__(self, config: dict, model_dir: str):
        self._config, self._model_dir = config, model_dir
        self._encoders: dict[str, Encoder] = {}
        self._loading = asyncio.Lock()
        run = parse(config)
        serving = run.serving
        threads = serving.engine.threads
        torch.set_num_threads(max(1, int(serving.language.num_cpus)) if threads == "auto" else threads)
        model, info, tokenizer = load_model(Path(model_dir))
        self._template = info.make_template(tokenizer)
        self._max_wait_s = serving.limits.max_wait_s
        self._shorten = run.data.too_long == "shorten"
        on_gpu = bool(serving.language.num_gpus) and torch.cuda.is_available()
        in_bf16 = serving.engine.precision == "bf16" or (serving.engine.precision == "auto" and on_gpu)
        dtype = torch.bfloat16 if in_bf16 else torch.float32
        self._group = None
        if serving.language.expert_parallel.size:
            self._group = experts.make_group(model, Path(model_dir) / WEIGHTS, run, dtype)
        model.to("cuda" if on_gpu else "cpu", dtype)
        if serving.engine.backend == "vllm":
            self._engine = VllmEngine(model, tokenizer, serving.engine, torch.get_num_threads())
        else:
            self._engine = Engine(model, tokenizer, serving.engine, keep_weights=False)
        self._experts = tuple(info.model["moe"]["slots"]) if info.sparse else ()
        self._backend: Backend | None = None
        self._metrics = LanguageMetrics(self._experts)
        self._tracer = Tracer(serving.tracing, "language")

    async def generate(self, task: Task, *soft_tokens: np.ndarray) -> AsyncIterator[Told]:
        """``soft_tokens``: [M, H] of each media file, in the order of the placeholders. Raises RequestRefused."""
        with self._tracer.span("generate", task.trace, goes_on_from=len(task.generated)) as span:
            tokens = 0
            async with aclosing(self._generate(task, soft_tokens)) as items:
                async for told in items:
                    for item in told:
                        if isinstance(item, Started):
                            span.set_attribute("prompt_tokens", item.prompt_tokens)
                        elif not tokens:
                            span.add_event("first token")
                        tokens += 0 if isinstance(item, Started) else len(item.token_ids)
                    span.set_attribute("tokens", tokens)
                    yield told

    async def _generate(self, task: Task, soft_tokens: Sequence[np.ndarray]) -> AsyncIterator[Told]:
        sample = Sample("", "", task.turns, tuple(Media(kind, ()) for kind in task.kinds), {})
        encode = partial(self._encode, sample, soft_tokens, task.params.max_new_tokens or 1)
        is_short = sum(len(text) for turn in task.turns for text in turn) <= SHORT
        # A long text takes seconds, in which the event loop would answer no health check.
        ids, note = encode() if is_short else await asyncio.to_thread(encode)
        files = list(soft_tokens[len(soft_tokens) - sum(token < 0 for token in ids) :])
        request = GenerationRequest(task.request_id, ids, files, task.params, task.trial, task.generated, task.priority)
        tokens, ended = 0, False
        told: Told = ()
        try:
            async with aclosing(self._running().generate(request)) as items:
                async for item in items:
                    if isinstance(item, Admitted):
                        sizes = tuple(values.nbytes for values in soft_tokens)
                        told = (Started(item.prompt_tokens, sizes, self._experts, note),)
                        if not item.waits:  # It goes with the first output: every message has its price.
                            continue
                    else:
                        tokens += len(item.token_ids)
                        told = (*told, item)
                    yield told
                    told = ()
            ended = True
        except EngineStopped as error:
            _end(error)
        finally:
            logger.info(f"generated {tokens} tokens" if ended else f"left after {tokens} tokens: the slot is free")

    async def encode(self, file: MediaFile) -> np.ndarray:
        """Soft tokens [M, H] of a file whose own encoder is away. Raises MediaRefused."""
        tower = TOWER_OF[file.kind]
        async with self._loading:
            if tower not in self._encoders:
                logger.warning(f"no {tower} encoder: its tower is loaded here")
                self._encoders[tower] = await asyncio.to_thread(self._load_encoder, tower)
        return await self._encoders[tower].encode(file)

    def _load_encoder(self, tower: str) -> Encoder:
        from serve.encoders import Encoder

        threads = torch.get_num_threads()
        encoder = Encoder(self._config, self._model_dir, tower)
        torch.set_num_threads(threads)
        return encoder

    def _encode(self, sample: Sample, soft_tokens: Sequence[np.ndarray], answer: int) -> tuple[list[int], str]:
        """Ids of the prompt, and what of it was left out for want of room (if ``data.too_long`` allows that; else, or
        where nothing can be, the engine refuses it). ``answer``: tokens that must fit after it."""
        ids = self._template.encode_prompt(sample)
        if self._shorten:

            def fits(part: Sample) -> bool:
                soft = sum(map(len, soft_tokens[len(soft_tokens) - len(part.media) :]))
                length = len(self._template.encode_prompt(part)) - len(part.media) + soft
                return length + answer <= self._engine.max_positions

            shorter = None if fits(sample) else shorten(sample, fits, keep_turns=False)
            if shorter is not None:
                return self._template.encode_prompt(shorter.sample), shorter.note
        return ids, ""

    async def ready(self) -> dict:
        """Counters and gauges of the engine."""
        await self.check_health()
        moves = {} if self._group is None else {"expert_moves": self._group.moves}
        return self._running().stats() | moves | {"pid": os.getpid()}

    async def check_health(self) -> None:
        try:
            self._running().check()
        except EngineStopped as error:
            _end(error)
        if self._group is not None:
            await asyncio.to_thread(experts.check, self._group)

    def _running(self) -> Backend:
        """The backend belongs to the event loop of requests, in which the constructor does not run."""
        if self._backend is None:
            engine = self._engine
            if isinstance(engine, Engine):
                self._backend = AsyncEngine(engine, self._max_wait_s)
                give_way(but=self._backend.thread_id)
            else:
                self._backend = engine
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


def _end(error: EngineStopped) -> NoReturn:
    """The end of this replica. Serve starts another at once, and who asked goes on there; an engine without its thread
    would answer with errors until Serve had found out."""
    logger.critical(f"this replica ends: {error}")
    logging.shutdown()
    os._exit(1)
