"""One request through the deployments: media to encoders, their soft tokens to the language model, tokens back.

An encoder's answer is passed on as a reference that nobody here reads: arrays go from the encoder's node to the
language model's through the object store. When a replica dies, the request starts again unless the client has seen a
part of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from ray.exceptions import (
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from serve.cache import EmbeddingCache
from serve.calls import MediaFile, MediaRefused, Started, Task
from serve.errors import ApiError
from serve.metrics import IngressMetrics
from serve.suspects import Suspects
from unimoe_ray.inference.request import EngineBusy, Output, RequestRefused

logger = logging.getLogger("ray.serve")
LANGUAGE = "language"
# A request that lost its replica this often for reasons of its own would be refused by then; the rest is bad luck.
MAX_TRIES = 5
# What a call raises when the process or node behind it, or a value that it left, is gone. A shared call is cancelled
# when the client that made it leaves.
CRASHED = (RayActorError, ObjectLostError, WorkerCrashedError, ReplicaUnavailableError)
LOST = (*CRASHED, TaskCancelledError, asyncio.CancelledError)


@dataclass(frozen=True)
class _Call:
    """key: what is asked, by content; keys: of each file, by kind, content and model."""

    key: str
    files: list[MediaFile]
    keys: list[str]


class Relay:
    """encoders: handles by media kind; language: handle of the language model. All of them by reference."""

    def __init__(
        self,
        encoders: dict[str, DeploymentHandle],
        language: DeploymentHandle,
        *,
        fingerprint: str,
        cache_bytes: int,
        retry_after_s: int,
        metrics: IngressMetrics,
    ):
        # Serve's throughput mode would send arguments by value over gRPC, at most 4 MiB of them.
        by_reference: dict[str, Any] = {"_by_reference": True}
        self._encoders = {kind: handle.options(**by_reference) for kind, handle in encoders.items()}
        self._language = language.options(stream=True, **by_reference)
        self._fingerprint = fingerprint
        self._cache: EmbeddingCache[DeploymentResponse] = EmbeddingCache(cache_bytes)
        self._suspects = Suspects()
        self._turns: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._retry_after_s = retry_after_s
        self._metrics = metrics

    async def run(self, task: Task, files: list[MediaFile], *, streaming: bool) -> AsyncIterator[Started | Output]:
        """``Started``, then outputs to the last. A second ``Started`` begins anew: forget the outputs before it. While
        ``streaming`` that happens only until the first output with something to show. Raises ApiError."""
        keys = [f"{file.key}/{self._fingerprint}" for file in files]
        call = _Call(task.key(keys), files, keys)
        for _ in range(MAX_TRIES):
            self._refuse_crashers(call)
            shown = False
            alone = self._suspects.is_suspect(call.key)
            encoded: list[DeploymentResponse] = []
            try:
                encoded = await asyncio.gather(*map(self._encode, files, keys))
                generating = self._generate(replace(task, alone=alone), encoded)
                async with self._turn(LANGUAGE, alone), aclosing(generating) as items:
                    async for item in items:
                        if isinstance(item, Started):
                            self._note_sizes(keys, item)
                        shown |= isinstance(item, Output) and bool(item.text or item.logprobs)
                        yield item
                self._suspects.clear(call.key)
                return
            except (RayError, RayServeException, asyncio.CancelledError) as error:
                _raise_if_ours(error)
                await self._look_into(call, alone, encoded, error)
            if streaming and shown:
                raise ApiError(503, "the answer broke off: the model's replica ended", code="replica_lost")
            self._metrics.retries.inc()
        raise ApiError(503, "the model's replicas keep ending; try again later", retry_after=self._retry_after_s)

    async def _generate(self, task: Task, encoded: list[DeploymentResponse]) -> AsyncIterator[Started | Output]:
        """A call to the language model, cancelled when it is left before its end."""
        items = self._language.generate.remote(task, *encoded)
        ended = False
        try:
            async for item in items:
                yield item
            ended = True
        finally:
            if not ended:
                items.cancel()

    async def _encode(self, file: MediaFile, key: str) -> DeploymentResponse:
        """The soft tokens of a file, under way or in the object store."""
        known = self._cache.get(key)
        self._metrics.cache(file.kind, known is not None, self._cache.nbytes)
        if known is not None:
            return known
        if not self._suspects.is_suspect(key):
            response = self._encoders[file.kind].encode.remote(file)
            self._cache.put(key, response)
            return response
        async with self._turn(file.kind, alone=True):
            response = self._encoders[file.kind].encode.remote(replace(file, alone=True))
            if (outcome := await _settled(response)) is not None and _is_a(outcome, CRASHED):
                self._suspects.crashed(key, alone=True)
                self._refuse_crashers(_Call("", [file], [key]))
            self._suspects.clear(key)
        self._cache.put(key, response)
        return response

    @asynccontextmanager
    async def _turn(self, deployment: str, alone: bool) -> AsyncIterator[None]:
        """Suspects go to a deployment one after the other: if it dies, there is one culprit."""
        if not alone:
            yield
            return
        async with self._turns[deployment]:
            yield

    def _refuse_crashers(self, call: _Call) -> None:
        for file, key in zip(call.files, call.keys, strict=True):
            if self._suspects.is_refused(key):
                raise ApiError(400, f"{file.name}: this file has crashed its encoder twice", file.name, "crashes")
        if self._suspects.is_refused(call.key):
            raise ApiError(400, "this request has crashed the model twice", "messages", "crashes")

    async def _look_into(
        self, call: _Call, alone: bool, encoded: list[DeploymentResponse], error: BaseException
    ) -> None:
        """After an error of the language model's call, which may be one of the encoders' whose answers it waited for:
        raises ApiError, or returns when the call may be tried again."""
        outcomes = await asyncio.gather(*map(_outcome, encoded))
        lost = []
        for file, key, response, outcome in zip(call.files, call.keys, encoded, outcomes, strict=False):
            if outcome is None:
                continue
            self._cache.drop(key, response)
            cause = outcome.cause if isinstance(outcome, RayTaskError) else outcome
            if isinstance(cause, MediaRefused):
                raise ApiError(400, str(cause), file.name, "invalid_media") from None
            if _is_a(outcome, LOST):
                lost.append(file.kind)
            if _is_a(outcome, CRASHED):
                self._suspects.crashed(key, alone=False)
        if not _is_a(error, LOST):
            raise self._api_error(error) from error
        if not lost and _is_a(error, CRASHED):
            self._suspects.crashed(call.key, alone)
        logger.warning(f"lost {', '.join(lost) or LANGUAGE} while answering: {type(error).__name__}")

    def _note_sizes(self, keys: list[str], started: Started) -> None:
        for key, nbytes in zip(keys, started.media_bytes, strict=True):
            self._cache.measured(key, nbytes)

    def _api_error(self, error: RayError | RayServeException) -> ApiError:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, BackPressureError | EngineBusy):
            message = "too many requests are waiting; try again later"
            return ApiError(429, message, code="busy", retry_after=self._retry_after_s)
        if isinstance(cause, RequestRefused):
            return ApiError(400, cause.message, cause.param, "invalid_value")
        if isinstance(cause, DeploymentUnavailableError):
            return ApiError(503, "the model can't be reached", retry_after=self._retry_after_s)
        logger.error(f"unexpected error of a deployment: {error}")
        return ApiError(500, f"the model failed ({type(cause).__name__})")


def _is_a(error: BaseException, kinds: tuple[type[BaseException], ...]) -> bool:
    """Serve wraps the loss of the encoder behind an argument, and names it as the cause."""
    return isinstance(error, kinds) or isinstance(error.__cause__, kinds)


async def _outcome(response: DeploymentResponse) -> BaseException | None:
    """The error of an encoder's answer; None when it is there, or not known within a moment."""
    done, _ = await asyncio.wait({asyncio.ensure_future(_settled(response))}, timeout=2.0)
    return done.pop().result() if done else None


async def _settled(response: DeploymentResponse) -> BaseException | None:
    try:
        await response
    except (RayError, RayServeException, asyncio.CancelledError) as error:
        _raise_if_ours(error)
        return error
    return None


def _raise_if_ours(error: BaseException) -> None:
    """A cancellation of this very task must go on; that of a call that was waited for must not."""
    if isinstance(error, asyncio.CancelledError) and asyncio.current_task().cancelling():
        raise error
