"""The HTTP side of the ingress on a real server, around a runner that says what it is told to."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
import pytest
import requests
import uvicorn
from starlette.types import ASGIApp

from serve.calls import Started
from serve.chat import Chat
from serve.errors import ApiError
from serve.http import Endpoint, build_app
from serve.keys import ApiKeys, Buckets
from serve.tracing import Tracer
from unimoe_ray.config.serving import ServingConfig
from unimoe_ray.inference.request import KINDS, Output, TokenLogprob

MODEL = "tiny/one"
FOREVER = float("inf")
TICK_S = 0.05
LOAD = np.zeros((len(KINDS), 1, 2), np.int64)
LOAD[KINDS.index("text")] = [[3, 1]]
LOAD[KINDS.index("answer")] = [[0, 4]]
STARTED = Started(prompt_tokens=7, media_bytes=(), experts=("base", "image"))
TOKENS = (TokenLogprob(b"a ", -0.5, ((b"a ", -0.5), (b"\xf0\x9f", -1.5))), TokenLogprob(b"cat", -0.25))
ANSWER = (
    STARTED,
    Output("r", "a ", (5,), TOKENS[:1]),
    Output("r", "", (6,)),
    Output("r", "cat", (7,), TOKENS[1:]),
    Output("r", "", (2,), finish_reason="stop", expert_load=LOAD),
)
BROKEN = ApiError(503, "the model's replica ended", code="replica_lost", retry_after=2)


@dataclass
class Runner:
    """Says ``script``: what a language model says, seconds to wait, or errors to raise. ticks: how often it has waited
    ``TICK_S``: unlike seconds they stand still when this process does, so a bound on them holds on any machine."""

    script: tuple = ANSWER
    ticks: int = 0
    tasks: list = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)

    async def run(self, task, files):
        self.tasks.append((task, files))
        try:
            for item in self.script:
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, float):
                    left = item
                    while left > 0:
                        await asyncio.sleep(min(left, TICK_S))
                        self.ticks, left = self.ticks + 1, left - TICK_S
                else:
                    yield item
        finally:
            self.closed.set()


@dataclass
class Times:
    """Takes the place of the metrics."""

    seen: list[float] = field(default_factory=list)

    def observe(self, seconds: float) -> None:
        self.seen.append(seconds)


@dataclass(frozen=True)
class Site:
    """A running server. statuses: of its answers, as the metrics are told."""

    port: int
    runner: Runner
    statuses: list[int]
    ttft: Times
    inter_token: Times

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, body: bytes | dict, **options) -> requests.Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return requests.post(f"{self.url}/v1/chat/completions", data=data, timeout=60, **options)

    def chat(self, content="hi", **rest) -> requests.Response:
        return self.post(body_of(content, **rest))

    def get(self, path: str, **options) -> requests.Response:
        return requests.get(self.url + path, timeout=60, **options)

    def raw(self, data: bytes) -> tuple[int, bytes]:
        """Status and body of the answer to exactly these bytes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(data)
            answer = b""
            with suppress(ConnectionResetError):
                while more := connection.recv(65536):
                    answer += more
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), body


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def body_of(content="hi", **rest) -> dict:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}]} | rest


@contextmanager
def serving(
    *script,
    keys: str | None = None,
    rights: dict | None = None,
    hosts: tuple[str, ...] = (),
    voice_as: str = "speech",
    unhealthy: str | None = None,
    clock: Callable[[], float] = time.monotonic,
    around: Callable[[ASGIApp], ASGIApp] = lambda app: app,
    **limits,
) -> Iterator[Site]:
    """The application on a port of its own. Without a ``script`` the runner gives ``ANSWER``. clock: of the keys'
    limits; around: what stands before the application."""
    config = ServingConfig.model_validate(
        {"limits": limits, "media_hosts": list(hosts), "api_keys_file": keys} | (rights or {})
    )
    site_runner, statuses, times = Runner(script or ANSWER), [], (Times(), Times())

    async def healthy() -> str | None:
        return unhealthy

    async def metrics() -> bytes:
        return b"requests_total 1\n"

    observer = type("Observer", (), {"ttft": times[0], "inter_token": times[1]})
    chat = Chat(site_runner, config, MODEL, voice_as, observer)
    keys, rates = ApiKeys(config), Buckets(clock)
    app = build_app(
        Endpoint(MODEL, chat, keys, rates, Tracer(None, "test"), config.limits, healthy, metrics, statuses.append)
    )
    options = {"log_config": None, "access_log": False, "lifespan": "off", "timeout_graceful_shutdown": 1}
    server = uvicorn.Server(uvicorn.Config(around(app), **options))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield Site(listening.getsockname()[1], site_runner, statuses, *times)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with serving() as site:
        yield site


@pytest.fixture
def no_traceback(caplog):
    """Nothing may end in an exception that nobody expected, whatever the client got to see."""
    yield
    assert not tracebacks(caplog.get_records("call")), caplog.text


def tracebacks(records: list[logging.LogRecord]) -> list[type]:
    return [record.exc_info[0] for record in records if record.exc_info]


def error_of(reply: requests.Response, status: int) -> dict:
    """The error of an answer, if it is one as OpenAI's."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    return check_error(reply.json())


def check_error(body: dict) -> dict:
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    error = body["error"]
    assert isinstance(error["message"], str) and error["message"] and len(error["message"]) < 1000
    assert "Traceback" not in error["message"] and ".py" not in error["message"]
    assert all(error[name] is None or isinstance(error[name], str) for name in ("param", "code"))
    return error


def events_of(reply: requests.Response) -> list:
    """Events of a stream, "[DONE]" included."""
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-store"
    blocks = reply.text.split("\n\n")
    assert blocks.pop() == "" and all(block.startswith("data: ") and "\n" not in block for block in blocks)
    payloads = [block.removeprefix("data: ") for block in blocks]
    return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]


def http_head(length: int | None = None, *headers: bytes, path: bytes = b"/v1/chat/completions") -> bytes:
    lines = [b"POST %s HTTP/1.1" % path, b"Host: a", b"Connection: close", *headers]
    lines += [] if length is None else [b"Content-Length: %d" % length]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def chunked(*parts: bytes) -> bytes:
    """A request whose length nobody knows before its end."""
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return http_head(None, b"Transfer-Encoding: chunked") + pieces + b"0\r\n\r\n"
