"""POST /v1/chat/completions, from the parsed request to the JSON of the answer or its events. Knows no Ray."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from serve.calls import MediaFile, Started, Task
from serve.conversation import MediaPart, read_conversation, sampling_params
from serve.errors import ApiError
from serve.media import FetchLimits, RefusedMedia, decode_base64, read_media
from serve.openai_api import ChatRequest, chunk, completion
from unimoe_ray.config.serving import ServingConfig
from unimoe_ray.inference.request import KINDS, Output, TokenLogprob

Item = TypeVar("Item")
# Told how many tokens a request has taken.
Spend = Callable[[int], Awaitable[None]]
# A JSON object, or the word that ends a stream.
Event = dict[str, Any] | str
MB = 1_000_000


class Runner(Protocol):
    """What answers a task (``serve.relay.Relay``)."""

    def run(self, task: Task, files: list[MediaFile]) -> AsyncIterator[Started | Output]: ...


class Observer(Protocol):
    """Where times go: ``observe`` takes seconds."""

    ttft: Any
    inter_token: Any


@dataclass
class Answer:
    """An answer as far as it has come."""

    started: Started | None = None
    text: str = ""
    tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    last: Output | None = None

    def take(self, item: Started | Output) -> None:
        """Raises ApiError when the engine gave up."""
        if isinstance(item, Started):
            self.started = item
            return
        if item.finish_reason == "error":
            raise ApiError(500, f"the model failed: {item.error}")
        self.text += item.text
        self.tokens += len(item.token_ids)
        self.logprobs += item.logprobs
        self.finish_reason = item.finish_reason
        self.last = item

    def usage(self) -> dict[str, int]:
        prompt = self.started.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": self.tokens, "total_tokens": prompt + self.tokens}

    def shortened(self) -> dict[str, str]:
        """What of the prompt was left out, if anything."""
        return {"prompt_shortened": self.started.note} if self.started.note else {}

    def expert_load(self) -> dict[str, Any]:
        """Routed slots per modality, sparse layer and expert; modalities without tokens are left out."""
        counts = self.last.expert_load
        kinds = () if counts is None else [(kind, counts[i]) for i, kind in enumerate(KINDS) if counts[i].any()]
        return {"experts": list(self.started.experts), "load": {kind: part.tolist() for kind, part in kinds}}


class Chat:
    """Answers chat requests for one model."""

    def __init__(self, runner: Runner, config: ServingConfig, model: str, voice_as: str, observer: Observer):
        self._runner, self._model, self._voice_as, self._observer = runner, model, voice_as, observer
        self._limits = config.limits
        self._fetch = FetchLimits(
            max_bytes=int(config.limits.max_media_mb * MB),
            seconds=config.limits.fetch_seconds,
            hosts=tuple(config.media_hosts),
        )

    async def prepare(self, request: ChatRequest, request_id: str) -> tuple[Task, list[MediaFile]]:
        """The task and its media files, fetched and decoded from base64. Raises ApiError."""
        if request.model != self._model:
            raise ApiError(
                404,
                f"the model '{request.model[:80]}' does not exist; there is '{self._model}'",
                "model",
                "model_not_found",
            )
        conversation = read_conversation(request, self._voice_as, self._limits)
        files = await asyncio.gather(*(self._read(part) for part in conversation.media))
        kinds = tuple(part.kind for part in conversation.media)
        return Task(request_id, conversation.turns, kinds, sampling_params(request)), list(files)

    async def complete(
        self, request: ChatRequest, task: Task, files: list[MediaFile], deadline: float, spend: Spend
    ) -> dict[str, Any]:
        """The whole answer as one object. ``deadline``: ``time.monotonic`` of its end. Raises ApiError."""
        answer = Answer()
        async for item in self._items(task, files, deadline, spend):
            answer.take(item)
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text},
            "finish_reason": answer.finish_reason,
            "logprobs": _logprobs(answer.logprobs) if request.logprobs else None,
        }
        extra = {"expert_load": answer.expert_load()} if request.expert_load else {}
        extra |= answer.shortened()
        return completion(task.request_id, self._model, choices=[choice], usage=answer.usage(), **extra)

    async def stream(
        self, request: ChatRequest, task: Task, files: list[MediaFile], deadline: float, spend: Spend
    ) -> AsyncIterator[list[Event]]:
        """The events of the answer, those together that are there at the same time; the first come with the first
        text. Raises ApiError, at any time."""
        answer, created, begun = Answer(), int(time.time()), False

        def event(delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
            choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
            return chunk(task.request_id, self._model, created, [choice])

        async for item in self._items(task, files, deadline, spend):
            answer.take(item)
            if isinstance(item, Started) or not (item.text or item.logprobs or item.finish_reason):
                continue
            events: list[Event] = [] if begun else [event({"role": "assistant", "content": ""})]
            begun = True
            if item.text or item.logprobs:
                logprobs = _logprobs(item.logprobs) if request.logprobs else None
                events.append(event({"content": item.text}, logprobs=logprobs))
            if item.finish_reason is not None:
                events.append(event({}, item.finish_reason))
                wants_usage = request.stream_options is not None and request.stream_options.include_usage
                extra = ({"usage": answer.usage()} if wants_usage else {}) | answer.shortened()
                if request.expert_load:
                    extra["expert_load"] = answer.expert_load()
                if extra:
                    events.append(chunk(task.request_id, self._model, created, [], **extra))
                events.append("[DONE]")
            yield events

    async def _items(
        self, task: Task, files: list[MediaFile], deadline: float, spend: Spend
    ) -> AsyncIterator[Started | Output]:
        """What the runner says, in time, with the time that it takes. The tokens are spent whoever is to blame for an
        early end."""
        items = self._runner.run(task, files)
        arrived = before = time.monotonic()
        tokens = 0
        try:
            while (item := await _next_before(items, deadline)) is not None:
                if isinstance(item, Started):
                    await spend(item.prompt_tokens)
                elif item.token_ids:
                    now, new = time.monotonic(), len(item.token_ids)
                    if tokens:
                        self._observer.inter_token.observe((now - before) / new)
                    else:
                        self._observer.ttft.observe(now - before)
                    before, tokens = now, tokens + new
                yield item
        except TimeoutError:
            limit = f"{self._limits.request_seconds:g} s"
            seconds = time.monotonic() - arrived
            raise ApiError(504, f"no answer within {limit} (given up after {seconds:.1f} s)", code="timeout") from None
        finally:
            await items.aclose()
            if tokens:
                await spend(tokens)

    async def _read(self, part: MediaPart) -> MediaFile:
        try:
            if part.base64 is not None:
                data = decode_base64(part.base64, self._fetch.max_bytes)
            else:
                data = await read_media(part.url, self._fetch)
        except RefusedMedia as error:
            raise ApiError(error.status, f"{part.name}: {error}", part.name, "invalid_media") from None
        return MediaFile(part.kind, data, part.name)


def server_sent(events: list[Event]) -> str:
    return "".join(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events)


async def _next_before(items: AsyncIterator[Item], deadline: float) -> Item | None:
    """The next item, None at the end. Raises TimeoutError."""
    try:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):  # Unlike wait_for, it makes no task.
            return await anext(items)
    except StopAsyncIteration:
        return None


def _logprobs(tokens: list[TokenLogprob] | tuple[TokenLogprob, ...]) -> dict[str, Any]:
    def describe(token: bytes, logprob: float) -> dict[str, Any]:
        return {"token": token.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(token)}

    content = [
        describe(item.token, item.logprob) | {"top_logprobs": [describe(*other) for other in item.top]}
        for item in tokens
    ]
    return {"content": content}
