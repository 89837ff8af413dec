"""Servers and names for tests of media URLs. 127.0.0.1 plays the public internet, 127.0.0.2 the private network."""

from __future__ import annotations

import asyncio
import functools
import inspect
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import asynccontextmanager, contextmanager, suppress
from ipaddress import IPv4Address

import pytest
from aiohttp import web

from serve.media import (
    FetchLimits,
    RefusedMedia,
    fetch,
)

PUBLIC, PRIVATE = "127.0.0.1", "127.0.0.2"
FILE = bytes(range(256)) * 8
OK = b"HTTP/1.1 200 OK\r\n"

PRIVATE_ADDRESSES = """
    127.0.0.1 127.8.8.8 10.0.0.1 10.255.255.255 172.16.0.1 172.31.255.255 192.168.0.1 169.254.169.254 100.64.0.1
    100.127.255.255 0.0.0.0 0.1.2.3 192.0.0.192 192.0.2.1 198.18.0.1 224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255
    168.63.129.16 ::1 :: fe80::1 fe80::1%eth0 fc00::1 fd00:ec2::254 fec0::1 ff02::1 ff0e::1 2001:db8::1 4000::1
    ::ffff:10.0.0.1 ::ffff:127.0.0.1 ::ffff:169.254.169.254 ::127.0.0.1
    64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::7f00:1 64:ff9b:1::808:808
    2002:7f00:1:: 2002:a00:1::1 2002:a9fe:a9fe:: 2001:0:4136:e378:8000:63bf:80ff:fffe 2001:0:7f00:1::
"""
PUBLIC_ADDRESSES = """
    8.8.8.8 1.1.1.1 93.184.216.34 172.15.255.255 172.32.0.1 100.63.255.255 100.128.0.1 169.253.0.1 223.255.255.254
    2606:4700::1111 2001:4860:4860::8888 ::ffff:8.8.8.8 64:ff9b::808:808 2002:808:808::1
"""
OTHER_NOTATIONS_OF_LOOPBACK = ["2130706433", "0x7f.1", "0x7f000001", "017700000001", "0177.0.0.1", "127.1", "127.0.1"]


def is_local_public(address) -> bool:
    return address == IPv4Address(PUBLIC)


def limits(*hosts: str, max_bytes: int = 100_000, seconds: float = 60.0, redirects: int = 3) -> FetchLimits:
    return FetchLimits(max_bytes, seconds, hosts, redirects)


@contextmanager
def refused(message: str, status: int = 400):
    """Expects RefusedMedia with ``message`` in its text: one short line without an address that was not expected."""
    with pytest.raises(RefusedMedia) as caught:
        yield
    text = str(caught.value)
    assert message in text
    assert caught.value.status == status
    assert len(text) < 200 and text.isprintable() and text.isascii()
    assert not {address for address in (PUBLIC, PRIVATE) if address in text.replace(message, "")}


def asynchronous(test):
    """A coroutine function as a test."""

    @functools.wraps(test)
    def run(*arguments, **keywords):
        asyncio.run(test(*arguments, **keywords))

    return run


class Names:
    """A name service for the test: each name has answers, one after the other, the last one again and again. It says
    them while ``open`` is set."""

    def __init__(self):
        self.answers: dict[str, list[list[str]]] = {"media.test": [[PUBLIC]], "other.test": [[PUBLIC]]}
        self.asked: list[str] = []
        self.open = threading.Event()
        self.open.set()

    def getaddrinfo(self, host, port, family=0, type=0, proto=0, flags=0):
        self.asked.append(host)
        self.open.wait(60)
        if host not in self.answers:
            raise socket.gaierror(socket.EAI_NONAME, f"no {host} at {PRIVATE}")
        answers = self.answers[host]
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0))
            if ":" in address
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in found
        ]


@pytest.fixture
def names(monkeypatch) -> Names:
    names = Names()
    monkeypatch.setattr(socket, "getaddrinfo", names.getaddrinfo)
    return names


class Site:
    def __init__(self):
        self.port = 0
        self.requests: list[web.BaseRequest] = []


@asynccontextmanager
async def site(answer, address: str = PUBLIC, port: int = 0, tls: ssl.SSLContext | None = None):
    """A web server; ``answer`` is a response's arguments, or what handles a request."""
    served = Site()

    async def handle(request: web.BaseRequest):
        served.requests.append(request)
        if not callable(answer):
            return web.Response(**answer)
        reply = answer(request)
        return await reply if inspect.isawaitable(reply) else reply

    runner = web.ServerRunner(web.Server(handle), shutdown_timeout=0.1)
    await runner.setup()
    listening = web.TCPSite(runner, address, port, ssl_context=tls)
    await listening.start()
    served.port = runner.addresses[0][1]
    try:
        yield served
    finally:
        await runner.cleanup()


@asynccontextmanager
async def raw_site(*pieces: bytes, pause: float = 0.0, sent: list[bytes] | None = None):
    """A server that sends ``pieces``, ``pause`` seconds apart, whatever it is asked, and hangs up. Yields its port.
    sent: gets what was sent."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                if sent is not None:
                    sent.append(piece)
                await asyncio.sleep(pause)
        writer.close()

    server = await asyncio.start_server(answer, PUBLIC, 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def get(port: int, path: str = "/", host: str = "media.test", allowed: Callable = is_local_public, **keywords):
    """Fetches from a test server that the limits let through."""
    return fetch(f"http://{host}:{port}{path}", limits(f"{host}:{port}", **keywords), is_allowed_address=allowed)


def redirect(location: str, status: int = 302) -> web.Response:
    return web.Response(status=status, headers={"Location": location})
