"""An endpoint that is killed again and again under load, and one with slow clients.

UNIMOE_KILLS: how often a replica of each kind is killed (default: 3).
"""

from __future__ import annotations

import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest

from tests.serving.conftest import Endpoint, serve_run
from tests.serving.media import image, png, text
from tests.serving.test_faults import Told, kill, listen, replaced, wait_for
from tests.serving.test_routing import answers

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("UNIMOE_KILLS", 3))
CLIENTS = 6
SLOW = 60


@pytest.fixture(scope="module")
def besieged(servable_run) -> Iterator[Endpoint]:
    """Without a cache, so that every picture needs its encoder."""
    yield from serve_run(servable_run.config, "serving.limits.request_seconds=120", "serving.cache_mb=0")


def requests_of() -> list[dict]:
    """Greedy and seeded, with and without a picture."""
    long = {"max_completion_tokens": 200, "stop": ["~~~~"]}
    pictures = [[image(png(seed, 300)), text("what is this?")] for seed in range(3)]
    plain = [{"content": f"what is this? number {number}"} | long for number in range(3)]
    seeded = [{"content": content, "temperature": 1.1, "seed": 7} | long for content in (pictures[0], "what is it?")]
    return [*plain, *({"content": content} | long for content in pictures), *seeded]


class Load:
    """Clients that ask the same requests again and again, each when the answer to the one before has come."""

    def __init__(self, endpoint: Endpoint, requests: list[dict]):
        self._endpoint, self._requests = endpoint, requests
        self._done = threading.Event()
        self.told: list[tuple[int, Told, float]] = []

    def _client(self, number: int) -> None:
        while not self._done.is_set():
            number = (number + 1) % len(self._requests)
            begun = time.monotonic()
            told = listen(self._endpoint, self._requests[number])
            self.told.append((number, told, time.monotonic() - begun))

    @contextmanager
    def running(self) -> Iterator[None]:
        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(self._client, number) for number in range(CLIENTS)]
            try:
                yield
            finally:
                self._done.set()
                for client in clients:
                    client.result(timeout=150)


@pytest.mark.timeout(120 + 60 * KILLS)
@pytest.mark.parametrize("deployment", ["language", "image", "ingress"])
def test_kills_under_load(besieged, deployment):
    """No wrong answer, none that hangs, none lost."""
    requests = requests_of()
    right = [listen(besieged, request) for request in requests]
    assert all(told.error is None and len(told.text) > 20 for told in right)
    load, waits = Load(besieged, requests), []
    with load.running():
        for _ in range(KILLS):
            seen = len(load.told)
            pid = kill(besieged, deployment)
            waits.append(wait_for(lambda pid=pid: replaced(besieged, deployment, pid), 60))
            wait_for(lambda seen=seen: len(load.told) >= seen + 2 * CLIENTS, 60)
    failed = [told.error for _, told, _ in load.told if told.error is not None]
    whole = [(number, told, seconds) for number, told, seconds in load.told if told.error is None]
    print(
        f"{deployment}: {KILLS} kills, a new replica after {statistics.median(waits):.1f} s; {len(load.told)} answers, "
        f"{len(failed)} broken off, longest {max(seconds for *_, seconds in whole):.1f} s"
    )
    assert all(told.same() == right[number].same() for number, told, _ in whole)
    assert failed == []


def latency(endpoint: Endpoint, questions: int = 40) -> float:
    """90th percentile of the time that a short answer takes, seconds."""
    seconds = []
    for number in range(questions):
        begun = time.monotonic()
        assert endpoint.chat(f"what is this? number {number}", max_completion_tokens=4).status_code == 200
        seconds.append(time.monotonic() - begun)
    return float(np.percentile(seconds, 90))


def dribble(connection: socket.socket, done: threading.Event) -> None:
    """A request whose body comes a byte at a time."""
    connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n{")
    while not done.wait(0.5):
        connection.sendall(b" ")


def read_slowly(connection: socket.socket, done: threading.Event, endpoint: Endpoint) -> None:
    """A stream of which a byte is read at a time."""
    body = b'{"model": "%s", "messages": [{"role": "user", "content": "hi"}], "stream": true, "max_tokens": 300}'
    body %= endpoint.model.encode()
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )
    while not done.wait(0.5) and connection.recv(1):
        pass


@pytest.mark.timeout(200)
def test_slow_clients_slow_nobody_else(besieged):
    latency(besieged, 10)
    host, _, port = besieged.url.removeprefix("http://").partition(":")
    kinds: list[Callable] = [dribble, lambda connection, done: read_slowly(connection, done, besieged)]
    before, done = latency(besieged), threading.Event()
    seen = sum(answers(besieged))
    with ThreadPoolExecutor(SLOW) as pool, ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(SLOW)]
        clients = [pool.submit(kinds[n % 2], connection, done) for n, connection in enumerate(connections)]
        try:
            # The answers of those that read slowly have been made, and only the clients are slow.
            wait_for(lambda: sum(answers(besieged)) >= seen + SLOW // 2, 60)
            during = latency(besieged)
        finally:
            done.set()
        for client in clients:
            client.result(timeout=30)
    print(f"90th percentile: {before * 1e3:.0f} ms alone, {during * 1e3:.0f} ms beside {SLOW} slow clients")
    assert during < 2 * before
    assert latency(besieged, 5) > 0
