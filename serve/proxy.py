"""What clients see when the ingress itself goes: middleware of Serve's HTTP proxy.

Set by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.proxy:middlewares. Alone, the proxy answers a request whose
ingress replica died with a bare 500, and cuts a stream without a word. Throughput mode has another proxy, without this.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import deque
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError
from serve.priority import give_way
from serve.resume import OtherAnswerError, Rest, is_last

MAX_TRIES = 3
# Headers by which a client would steer Serve itself: switch off its cancellation, set its time limit, choose replicas.
STEERING = (
    *(b"x-request-disconnect-disabled", b"x-request-timeout-seconds"),
    *(b"serve-multiplexed-model-id", b"x-session-id"),
)
# A larger request is not kept for a second try.
MAX_KEPT_BYTES = 64 * 2**20
RETRY_AFTER_S = 2
# Key of the scope under which the ingress finds the whole body of a small request. Else it calls the proxy back for it:
# 3 ms, and a tenth of what a streamed answer costs both of them.
BODY = "unimoe_ray.body"
MAX_INLINE_BYTES = 2**20  # of the 4 MiB that a message over gRPC may have
# By this version of ASGI, Starlette does not listen for the client's leaving beside the answer: Serve cancels that.
WITHOUT_LISTENING = {"version": "3.0", "spec_version": "2.4"}
# Key of the scope for what is drawn of an answer whose request names no seed: the same when it is answered again.
SEED = "unimoe_ray.seed"
# A body that takes longer is the ingress's to wait for, with its limits.
INLINE_WAIT_S = 0.05


def middlewares() -> list[Middleware]:
    give_way()
    return [Middleware(SurviveIngress)]


class SurviveIngress:
    """A request whose answer did not come to its end is sent again (nothing here has side effects); a stream then goes
    on where it was, or ends with an error event. Errors in plain text, Serve's own, become errors as the OpenAI API
    writes them."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # Serve decodes some headers as UTF-8, and fails where they are not.
        headers = [
            (name, value.decode("utf-8", "replace").encode())
            for name, value in scope.get("headers", ())
            if name.lower().replace(b"_", b"-") not in STEERING
        ]
        scope = dict(scope, headers=headers) | {SEED: secrets.randbits(63)}
        request, answer = _Replayable(receive), _Answer(send)
        if _is_small(headers) and (body := await request.take_body()) is not None:
            scope |= {BODY: body, "asgi": WITHOUT_LISTENING}
        for _ in range(MAX_TRIES):
            await self.app(scope, request.receive, answer.send)
            if not answer.goes_on() or not request.rewind():
                break
        if not request.disconnected:
            await answer.complete()


def _is_small(headers: list[tuple[bytes, bytes]]) -> bool:
    length = Headers(raw=headers).get("content-length", "")
    return length.isdecimal() and 0 < int(length) <= MAX_INLINE_BYTES


class _Replayable:
    """The messages of a request, which can be read again from the start."""

    def __init__(self, receive: Receive):
        self._receive = receive
        self._next: asyncio.Future[Message] | None = None
        self._kept: list[Message] = []
        self._again: deque[Message] = deque()
        self._size = 0
        self.disconnected = False

    async def take_body(self) -> bytes | None:
        """The body, which is no message to be read then, if all of it is there soon."""
        end, parts = time.monotonic() + INLINE_WAIT_S, []
        while True:
            self._next = asyncio.ensure_future(self._receive())
            done, _ = await asyncio.wait({self._next}, timeout=max(0.0, end - time.monotonic()))
            if not done or self._next.result()["type"] != "http.request":
                break
            message = await self._read_next()
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                self._kept, self._size = [], 0
                return b"".join(parts)
        self.rewind()
        return None

    async def receive(self) -> Message:
        if self._again:
            return self._again.popleft()
        return await self._read_next()

    async def _read_next(self) -> Message:
        if self._next is None:
            message = await self._receive()
        else:  # Serve cancels whoever waits here; the next one must not find it cancelled.
            message = await asyncio.shield(self._next)
            self._next = None
        if message["type"] == "http.disconnect":
            self.disconnected = True
        else:
            self._size += len(message.get("body", b""))
            self._kept = [*self._kept, message] if self._size <= MAX_KEPT_BYTES else []
        return message

    def rewind(self) -> bool:
        """False when there is nobody to answer, or not everything was kept."""
        self._again = deque(self._kept)
        return not self.disconnected and self._size <= MAX_KEPT_BYTES


class _Answer:
    """Passes an answer on; knows whether it began, what it is, and whether it came to its end."""

    def __init__(self, send: Send):
        self._send = send
        self._start: Message | None = None  # held back: of an error in plain text, which is written anew
        self._text = b""
        self._is_stream = False
        self.started = False
        self._ended = False
        self._told = False  # all that a stream has to say
        self._sent: list[bytes] = []  # of a stream
        self._size = 0
        self._rest: Rest | None = None  # of a stream that is answered again
        self._other = False  # what came then was something else

    def goes_on(self) -> bool:
        """Whether it is worth asking again; then what comes next is that answer."""
        if not self.started:
            return True
        if self._ended or self._told or self._other or not self._is_stream or self._size > MAX_KEPT_BYTES:
            return False
        self._rest = Rest(b"".join(self._sent))
        return True

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = Headers(raw=message["headers"]).get("content-type", "")
            is_stream = kind.startswith("text/event-stream")
            if self._rest is not None:
                self._other |= not is_stream
                return
            self.started, self._is_stream = True, is_stream
            if message["status"] >= 400 and kind.startswith("text/plain"):
                self._start = message
                return
        elif message["type"] == "http.response.body":
            if self._rest is not None:
                message = self._new_of(self._rest, message)
            if self._other:
                return
            body = message.get("body", b"")
            self._ended = not message.get("more_body", False)
            self._told |= is_last(body)
            if self._start is not None:
                self._text += body
                if self._ended:
                    await self._write_error(self._start["status"], self._text.decode("utf-8", "replace")[:500])
                return
            if self._rest is not None and not body and not self._ended:
                return
            if self._is_stream:
                self._size += len(body)
                self._sent.append(body)
                if self._size > MAX_KEPT_BYTES:
                    self._sent.clear()
        await self._send(message)

    def _new_of(self, rest: Rest, message: Message) -> Message:
        if self._other:
            return message
        try:
            return message | {"body": rest.of(message.get("body", b""))}
        except OtherAnswerError:
            self._other = True
            return message

    async def complete(self) -> None:
        """Say what the ingress could not."""
        if not self.started:
            await self._write_error(503, "the server's ingress ended; try again")
        elif not self._ended and self._told:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        elif not self._ended and self._is_stream:
            error = ApiError(503, "the answer broke off: the server's ingress ended", code="replica_lost")
            event = f"data: {json.dumps(error.body())}\n\n".encode()
            await self._send({"type": "http.response.body", "body": event, "more_body": False})

    async def _write_error(self, status: int, message: str) -> None:
        retry: dict[str, Any] = {"retry_after": RETRY_AFTER_S} if status in (429, 503) else {}
        error = ApiError(status, message, **retry)
        headers = {"content-type": "application/json"} | error.headers()
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})
        await self._send({"type": "http.response.body", "body": json.dumps(error.body()).encode(), "more_body": False})
