"""An engine in a thread of its own, for many asynchronous callers."""

from __future__ import annotations

import asyncio
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

from unimoe_ray.inference.engine import Engine
from unimoe_ray.inference.pace import Pace
from unimoe_ray.inference.request import (
    Admitted,
    EngineBusy,
    EngineOverloaded,
    EngineStopped,
    GenerationRequest,
    Output,
)
from unimoe_ray.inference.sequence import Sequence

STOPPED = "the engine has stopped"
# Streams that may have ``messages_per_s`` each; of more each has fewer, to 1 / ``RAREST`` of that. A message costs the
# processes on its way .8 ms of CPU time: four streams' of 10 a second are 3 % of a core.
OFTEN = 4 * (os.cpu_count() or 1)
RAREST = 2.5


@dataclass
class _Held:
    """Outputs of a stream that are not told yet. told_at: when it was last told something, or had its first output if
    that was nothing yet, ``time.monotonic``; has_text: whether it was told any text."""

    told_at: float
    outputs: list[Output] = field(default_factory=list)
    has_text: bool = False


class AsyncEngine:
    """The ``Backend`` of this package. Make and call it in one event loop; only ``_run`` is in the thread.

    Callers leave their wishes in an inbox that the thread empties between steps, so that the engine needs no lock.
    A stream gets its first text and its end at once; in between, tokens come together in ``messages_per_s`` messages,
    fewer when there are many streams, as each costs its way through the deployments far more than its tokens.
    """

    def __init__(self, engine: Engine, max_wait_s: float = math.inf):
        self.engine, self._max_wait_s = engine, max_wait_s
        self._pace = Pace()
        # Priority and most new tokens of those that have not got a token yet.
        self._unanswered: dict[str, tuple[int, int]] = {}
        self._loop = asyncio.get_running_loop()
        self._inbox: deque[Sequence | str] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._streams: dict[str, asyncio.Queue[Output | EngineStopped]] = {}
        self._held: dict[str, _Held] = {}  # of the thread alone
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Admitted | Output]:
        self.check()
        if request.id in self._streams:
            raise ValueError(f"request id {request.id} is in use")
        config = self.engine.config
        if len(self._streams) >= config.max_running + config.max_waiting:
            raise EngineBusy(f"{len(self._streams)} requests are being answered or waiting already; try again later")
        sequence = self.engine.start(request)
        wait = self.wait_s(request.priority, sequence.max_new_tokens)
        if wait > self._max_wait_s and not request.generated:
            raise EngineOverloaded(wait, self._max_wait_s)
        waits = not self._has_room()
        queue = self._streams[request.id] = asyncio.Queue()
        self._unanswered[request.id] = (request.priority, sequence.max_new_tokens)
        self._send(sequence)
        finished, tokens = False, 0
        try:
            yield Admitted(sequence.prompt_tokens, sequence.max_new_tokens, waits)
            while not finished:
                output = await queue.get()
                if isinstance(output, EngineStopped):
                    raise output
                self._unanswered.pop(request.id, None)
                finished, tokens = output.finish_reason is not None, tokens + len(output.token_ids)
                yield output
        finally:
            del self._streams[request.id]
            self._unanswered.pop(request.id, None)
            if tokens:
                self._pace.answered(tokens)
            if not finished:
                self._send(request.id)

    def wait_s(self, priority: int = 0, new_tokens: int = 1) -> float:
        """Estimated seconds that a new request waits for a slot, behind those that go before it."""
        if self._has_room():
            return 0.0
        return self._pace.wait([most for other, most in self._unanswered.values() if other >= priority] + [new_tokens])

    def _has_room(self) -> bool:
        return not self.engine.waiting and len(self._streams) < self.engine.config.max_running

    @property
    def thread_id(self) -> int:
        """The system's, of the thread in which the engine computes."""
        return self._thread.native_id

    def stats(self) -> dict[str, Any]:
        return self.engine.stats()

    def check(self) -> None:
        if not self._thread.is_alive():
            raise EngineStopped(STOPPED)

    def close(self) -> None:
        self._closing = True
        self._wake.set()
        self._thread.join()

    def _send(self, wish: Sequence | str) -> None:
        self._inbox.append(wish)
        self._wake.set()

    def _run(self) -> None:
        try:
            while not self._closing:
                self._wake.clear()
                self._read_inbox()
                begun = time.perf_counter()
                outputs = self.engine.step()
                if self.engine.waiting:
                    tokens = sum(len(output.token_ids) for output in outputs)
                    self._pace.stepped(tokens, time.perf_counter() - begun)
                if due := self._due(outputs, time.monotonic()):
                    self._loop.call_soon_threadsafe(self._deliver, due)
                elif not outputs and not self.engine.has_work:
                    self._wake.wait()
        finally:  # Nobody may wait for an engine that is gone, whatever ended it.
            error = sys.exc_info()[1]
            reason = STOPPED if error is None else f"{STOPPED}: {type(error).__name__}: {error}"
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._fail_all, reason)

    def _read_inbox(self) -> None:
        while self._inbox:
            wish = self._inbox.popleft()
            if isinstance(wish, str):
                self.engine.cancel(wish)
                self._held.pop(wish, None)
            else:
                self.engine.add(wish)

    def _due(self, outputs: list[Output], now: float) -> list[Output]:
        """What streams are told now, with what was held of them before."""
        interval = min(max(1.0, len(self._held) / OFTEN), RAREST) / self.engine.config.messages_per_s
        due = []
        for output in outputs:
            held = self._held.setdefault(output.request_id, _Held(now))
            held.outputs.append(output)
            urgent = output.finish_reason is not None or output.text and not held.has_text
            if not urgent and now - held.told_at < interval:
                continue
            told = _together(held.outputs)
            held.outputs, held.told_at = [], now
            held.has_text = held.has_text or bool(told.text)
            if told.finish_reason is not None:
                del self._held[output.request_id]
            due.append(told)
        return due

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            if output.request_id in self._streams:
                self._streams[output.request_id].put_nowait(output)

    def _fail_all(self, reason: str) -> None:
        for queue in self._streams.values():
            queue.put_nowait(EngineStopped(reason))


def _together(outputs: list[Output]) -> Output:
    """One output that says what these say one after the other."""
    if len(outputs) == 1:
        return outputs[0]
    return replace(
        outputs[-1],
        text="".join(output.text for output in outputs),
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        logprobs=tuple(item for output in outputs for item in output.logprobs),
    )
