"""One request through the deployments: media to encoders, their soft tokens to the language model, tokens back.

An encoder's answer is passed on as a reference that nobody here reads: arrays go from the encoder's node to the
language model's through the object store, but for small ones that are known to be so. When the language model's replica
dies, another goes on from the tokens so far: the client sees a pause.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import secrets
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from ray import serve
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
from serve.calls import MediaFile, MediaRefused, Started, Task, Told
from serve.errors import ApiError
from serve.metrics import IngressMetrics
from serve.suspects import Suspects
from serve.watch import watched
from unimoe_ray.inference.request import EngineBusy, EngineOverloaded, Output, RequestRefused

logger = logging.getLogger("ray.serve")
LANGUAGE = "language"
# A request that lost its replica this often for reasons of its own would be refused by then; the rest is bad luck.
MAX_TRIES = 5
# Characters of a question by which requests without files are said to begin alike.
SHARED_START = 256
# New tokens that a suspect generates alone. The replica may have been further than what was seen of it when it died:
# who loses another one after such a trial gets a longer one.
TRIAL_TOKENS = 8
BUSY_WAIT_S = 0.5
# What a call raises when the process or node behind it, or a value that it left, is gone. A shared call is cancelled
# when the client that made it leaves.
CRASHED = (RayActorError, ObjectLostError, WorkerCrashedError, ReplicaUnavailableError)
LOST = (*CRASHED, TaskCancelledError, asyncio.CancelledError)
# Soft tokens and text up to this size travel by value: as with Ray's own calls, and a twentieth of what gRPC bears.
MAX_VALUE_BYTES = 100_000
MAX_VALUE_CHARACTERS = 50_000


@dataclass
class _Call:
    """key: what is asked, by content; place: of what it has in common with those that begin alike; keys: of each file,
    by kind, content and model. started, tokens, finished: how far the answer has come; lost: how often a replica was
    lost with it; alone: it is on trial now."""

    key: str
    place: str
    files: list[MediaFile]
    keys: list[str]
    started: bool = False
    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    lost: int = 0
    alone: bool = False


class Relay:
    """encoders: handles by media kind; language: handle of the language model. All of them by reference."""

    def __init__(
        self,
        encoders: dict[str, DeploymentHandle],
        language: DeploymentHandle,
        *,
        fingerprint: str,
        cache_bytes: int,
        fallback_s: float | None = None,
        affinity: bool = False,
        retry_after_s: int,
        metrics: IngressMetrics,
    ):
        # By value, over gRPC, a message takes a fraction of the time, but no message may be larger than 4 MiB.
        by_reference: dict[str, Any] = {"_by_reference": True}
        self._encoders = {kind: handle.options(**by_reference) for kind, handle in encoders.items()}
        self._language = language.options(stream=True, **by_reference)
        plain = {"request_serialization": "pickle", "response_serialization": "pickle"}  # quicker than cloudpickle
        self._language_by_value = language.options(stream=True, _by_reference=False, **plain)
        self._affinity = affinity
        self._fallback, self._fallback_s = language.options(**by_reference), fallback_s
        self._fingerprint = fingerprint
        self._cache: EmbeddingCache[DeploymentResponse] = EmbeddingCache(cache_bytes)
        self._suspects = Suspects()
        self._turns: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._retry_after_s = retry_after_s
        self._metrics = metrics

    async def run(self, task: Task, files: list[MediaFile]) -> AsyncIterator[Started | Output]:
        """``Started``, then outputs to the last, as if nothing happened to any replica. Raises ApiError.

        An answer that has started, or had a replica that was lost, is never sent away: it waits for a replica, for as
        long as the caller does.
        """
        keys = [f"{file.key}/{self._fingerprint}" for file in files]
        call = _Call(task.key(keys), _place(task, keys), files, keys)
        if task.params.seed is None:  # Whoever goes on must draw the same tokens.
            task = replace(task, params=replace(task.params, seed=secrets.randbits(63)))
        while call.lost < MAX_TRIES:
            encoded: list[DeploymentResponse] = []
            try:
                self._refuse_crashers(call)
                encoded = await asyncio.gather(*map(self._encode, files, keys))
                # Another name each time: the replica may still have the request, lost from sight.
                again = replace(task, request_id=f"{task.request_id}.{call.lost}", generated=tuple(call.tokens))
                async with aclosing(self._generate(again, call, encoded)) as items:
                    async for item in items:
                        if (told := self._take(call, item)) is not None:
                            yield told
                await self._small(task, keys, encoded)  # So that the next question about these files has them at hand.
                return
            except (RayError, RayServeException, asyncio.CancelledError) as error:
                _raise_if_ours(error)
                if call.finished:
                    return
                if await self._was_lost(call, encoded, error):
                    call.lost += 1
                    self._metrics.retries.inc()
                else:
                    await asyncio.sleep(BUSY_WAIT_S)
        self._refuse_crashers(call)
        message = "the model's replicas keep ending; try again later"
        raise ApiError(503, message, code="replica_lost", retry_after=self._retry_after_s)

    def _take(self, call: _Call, item: Started | Output) -> Started | Output | None:
        """Note how far the answer has come; None for what the caller knows already."""
        if isinstance(item, Started):
            self._note_sizes(call.keys, item)
            known, call.started = call.started, True
            return None if known else item
        call.tokens += item.token_ids
        call.finished = item.finish_reason is not None
        return item

    async def _generate(
        self, task: Task, call: _Call, encoded: list[DeploymentResponse]
    ) -> AsyncIterator[Started | Output]:
        """A call to the language model, cancelled when it is left before its end. What a suspect says on trial is kept
        until it is over, so that no client holds up the next one by being slow."""
        suspect = self._suspects.is_suspect(call.key)
        messages, tried = None, []
        values = await self._small(task, call.keys, encoded)
        try:
            async with self._turn(LANGUAGE, suspect):
                # It may have been cleared or refused while it waited for its turn.
                self._refuse_crashers(call)
                call.alone = self._suspects.is_suspect(call.key)
                trial = TRIAL_TOKENS * 4 ** max(0, call.lost - 1) if call.alone else 0
                handle = self._language if values is None else self._language_by_value
                if self._affinity:
                    handle = handle.options(session_id=call.place)
                soft_tokens = encoded if values is None else values
                messages = watched(handle.generate.remote(replace(task, trial=trial), *soft_tokens))
                if trial:
                    tried = await _tokens_of(messages, trial)
                    self._suspects.clear(call.key)
                    call.alone = False
            for item in tried:
                yield item
            async for told in messages:
                for item in told:
                    yield item
        finally:
            if messages is not None:
                await messages.aclose()

    async def _small(self, task: Task, keys: list[str], encoded: list[DeploymentResponse]) -> list[np.ndarray] | None:
        """The soft tokens of a task that is small enough to go by value; None if it is not, or not known to be."""
        sizes = [self._cache.size(key) for key in keys]
        if None in sizes or sum(sizes) > MAX_VALUE_BYTES:
            return None
        if sum(len(text) for turn in task.turns for text in turn) > MAX_VALUE_CHARACTERS:
            return None
        return [await self._read(key, response) for key, response in zip(keys, encoded, strict=True)]

    async def _read(self, key: str, response: DeploymentResponse) -> np.ndarray:
        """Small soft tokens, which are kept: to fetch them takes .4 ms, even of what is in this process."""
        value = self._cache.value(key)
        if value is None:
            value = await response
            self._cache.keep(key, response, value)
        return value

    async def _encode(self, file: MediaFile, key: str) -> DeploymentResponse:
        """The soft tokens of a file, under way or in the object store."""
        known = self._cache.get(key)
        self._metrics.cache(file.kind, known is not None, self._cache.nbytes)
        if known is not None:
            return known
        if not self._suspects.is_suspect(key):
            response = self._encoders[file.kind].encode.remote(file)
            self._cache.put(key, response)
            if self._fallback_s is not None and not await self._is_taken(file, response, self._fallback_s):
                response.cancel()  # Who shares it asks again.
                self._metrics.fallback(file.kind)
                response = self._fallback.encode.remote(file)
                self._cache.put(key, response)
            return response
        # Never in the language model's replica, which it may crash.
        async with self._turn(file.kind, alone=True):
            while True:
                self._refuse_crashers(_Call("", "", [file], [key]))
                response = self._encoders[file.kind].encode.remote(replace(file, alone=True))
                outcome = await _settled(response)
                if outcome is None or not _is_a(outcome, CRASHED):
                    break
                self._suspects.crashed(key, alone=True)
            self._suspects.clear(key)
        self._cache.put(key, response)
        return response

    async def _is_taken(self, file: MediaFile, response: DeploymentResponse, seconds: float) -> bool:
        """False when no replica of the encoder has taken the file in time, nor is there one that runs."""
        encoder = self._encoders[file.kind]
        waiting = asyncio.ensure_future(_taken(response))
        while not (await asyncio.wait({waiting}, timeout=seconds))[0]:
            status = await asyncio.to_thread(serve.status)
            states = status.applications[encoder.app_name].deployments[encoder.deployment_name].replica_states
            if not states.get("RUNNING"):
                logger.warning(
                    f"no replica of {encoder.deployment_name} for {seconds:g} s: {file.kind} goes to {LANGUAGE}"
                )
                return False
        return True

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
                message = f"{file.name}: this file has crashed its encoder twice, alone in it"
                raise ApiError(400, message, file.name, "crashes")
        if self._suspects.is_refused(call.key):
            raise ApiError(400, "this request has crashed the model twice, alone in it", "messages", "crashes")

    async def _was_lost(self, call: _Call, encoded: list[DeploymentResponse], error: BaseException) -> bool:
        """After an error of the language model's call, which may be one of the encoders' whose answers it waited for:
        raises ApiError, or returns when the call may be tried again; False if all that it needs is room."""
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
            if (call.started or call.lost) and _is_busy(error):
                return False
            raise self._api_error(error) from error
        if not lost and _is_a(error, CRASHED):
            self._suspects.crashed(call.key, call.alone)
        logger.warning(f"lost {', '.join(lost) or LANGUAGE} after {len(call.tokens)} tokens: {type(error).__name__}")
        return True

    def _note_sizes(self, keys: list[str], started: Started) -> None:
        for key, nbytes in zip(keys, started.media_bytes, strict=True):
            self._cache.measured(key, nbytes)

    def _api_error(self, error: RayError | RayServeException) -> ApiError:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, BackPressureError | EngineBusy):
            message = "too many requests are waiting; try again later"
            return ApiError(429, message, code="busy", retry_after=self._retry_after_s)
        if isinstance(cause, EngineOverloaded):
            message = f"all slots are taken; an answer would begin after some {cause.wait_s:.0f} s; try again later"
            over = max(self._retry_after_s, math.ceil(cause.wait_s - cause.max_wait_s))
            return ApiError(503, message, code="overloaded", retry_after=over)
        if isinstance(cause, RequestRefused):
            return ApiError(400, cause.message, cause.param, "invalid_value")
        if isinstance(cause, DeploymentUnavailableError):
            return ApiError(503, "the model can't be reached", retry_after=self._retry_after_s)
        logger.error(f"unexpected error of a deployment: {error}")
        return ApiError(500, f"the model failed ({type(cause).__name__})")


async def _tokens_of(items: AsyncIterator[Told], count: int) -> list[Started | Output]:
    """What comes with the first ``count`` tokens; less if that is all."""
    taken: list[Started | Output] = []
    async for told in items:
        taken += told
        outputs = [item for item in told if isinstance(item, Output)]
        count -= sum(len(output.token_ids) for output in outputs)
        if count <= 0 or any(output.finish_reason is not None for output in outputs):
            break
    return taken


def _place(task: Task, keys: list[str]) -> str:
    """Equal for requests with the same first file, else for those whose first questions begin alike."""
    common = keys[0] if keys else task.turns[0][0][:SHARED_START]
    return hashlib.sha256(common.encode("utf-8", "surrogatepass")).hexdigest()


def _is_busy(error: BaseException) -> bool:
    cause = error.cause if isinstance(error, RayTaskError) else error
    return isinstance(cause, BackPressureError | EngineBusy | EngineOverloaded)


def _is_a(error: BaseException, kinds: tuple[type[BaseException], ...]) -> bool:
    """Serve wraps the loss of the encoder behind an argument, and names it as the cause."""
    return isinstance(error, kinds) or isinstance(error.__cause__, kinds)


async def _outcome(response: DeploymentResponse) -> BaseException | None:
    """The error of an encoder's answer; None when it is there, or not known within a moment."""
    done, _ = await asyncio.wait({asyncio.ensure_future(_settled(response))}, timeout=2.0)
    return done.pop().result() if done else None


async def _taken(response: DeploymentResponse) -> None:
    """Returns when a replica has it; what goes wrong is for whoever uses the answer."""
    try:
        await response._to_object_ref()
    except (RayError, RayServeException, asyncio.CancelledError) as error:
        _raise_if_ours(error)


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
