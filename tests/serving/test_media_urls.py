"""URLs in requests: what is fetched, and that everything else is refused before it costs anything.

The servers are real, on loopback addresses. 127.0.0.1 plays the public internet and 127.0.0.2 the private network.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import gzip
import inspect
import pickle
import socket
import ssl
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, ip_address
from pathlib import Path

import aiohttp
import pytest
from aiohttp import http_parser, web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from yarl import URL

from serve.media import (
    MAX_DATA_HEADER,
    MAX_URL,
    FetchLimits,
    RefusedMedia,
    check_url,
    decode_base64,
    decode_data_url,
    fetch,
    is_public,
    read_media,
)
from unimoe_ray.errors import UsageError

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


def limits(*hosts: str, max_bytes: int = 100_000, seconds: float = 8.0, redirects: int = 3) -> FetchLimits:
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
    """A name service for the test: each name has answers, one after the other, the last one again and again."""

    def __init__(self):
        self.answers: dict[str, list[list[str]]] = {"media.test": [[PUBLIC]], "other.test": [[PUBLIC]]}
        self.asked: list[str] = []
        self.seconds = 0.0

    def getaddrinfo(self, host, port, family=0, type=0, proto=0, flags=0):
        self.asked.append(host)
        time.sleep(self.seconds)
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
async def raw_site(*pieces: bytes, pause: float = 0.0):
    """A server that sends ``pieces``, ``pause`` seconds apart, whatever it is asked, and hangs up. Yields its port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
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


# --- data: URLs and base64


@pytest.mark.parametrize("start", ["data:image/png;base64,", "data:;base64,", "DATA:audio/wav;codecs=1;BASE64,"])
def test_data_urls_are_decoded(start):
    url = start + base64.b64encode(FILE).decode()
    assert decode_data_url(url, len(FILE)) == FILE
    assert asyncio.run(read_media(url, limits(max_bytes=len(FILE)))) == FILE


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=1, max_size=70))
def test_base64_is_decoded_up_to_the_exact_limit(content):
    text = base64.b64encode(content).decode()
    assert decode_base64(text, len(content)) == content
    with refused("the file is larger than", 413):
        decode_base64(text, len(content) - 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the base64 data is empty"),
        ("QUJ", "3 characters of base64, not a multiple of 4"),
        ("QUJDR", "5 characters of base64, not a multiple of 4"),
        ("QQ", "2 characters of base64, not a multiple of 4"),
        ("QQ=", "3 characters of base64, not a multiple of 4"),
        ("QUI=QUI=", "malformed base64"),
        ("QQ==QUJD", "malformed base64"),
        ("Q===", "malformed base64"),
        ("====", "malformed base64"),
        ("=QUJ", "malformed base64"),
        ("-_-_", "malformed base64"),
        ("QU!D", "malformed base64"),
        ("QUJDQUJ\n", "malformed base64"),
        ("QUJD\r\n\r\n", "malformed base64"),
        ("QUI=\n\n\n\n", "malformed base64"),
        ("QU D", "malformed base64"),
        ("QU%3D", "not a multiple of 4"),
        ("QUJD\0\0\0\0", "malformed base64"),
        ("QUJé", "malformed base64"),
        ("QUJ\ud800", "malformed base64"),
    ],
)
def test_malformed_base64_is_refused(text, message):
    with refused(message):
        decode_base64(text, 1000)
    with refused(message):
        decode_data_url("data:image/png;base64," + text, 1000)


@pytest.mark.parametrize(
    "url",
    [
        "data:",
        "data:image/png",
        "data:image/png;base64",
        "data:image/png,QUJD",
        "data:text/plain;charset=utf-8,hello",
        "data:base64,QUJD",
        "data:image/png;base64 ,QUJD",
        "data:image/png;base64x,QUJD",
        "data:image/png;base64;x=1,QUJD",
        "data:" + "x" * MAX_DATA_HEADER + ";base64,QUJD",
        "datum:image/png;base64,QUJD",
        "",
    ],
)
def test_other_data_urls_are_refused(url):
    with refused("not of the form data:<type>;base64,<base64>"):
        decode_data_url(url, 1000)


@pytest.mark.parametrize("start", ["data:image/png;base64,", "data:image/png,"])
def test_huge_data_urls_are_refused_without_a_copy(start):
    url = start + "A" * (32 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(RefusedMedia):
            asyncio.run(read_media(url, limits(max_bytes=1_500_000)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


def test_messages_name_the_limit():
    with refused("the file is larger than 1.5 MB", 413):
        decode_base64("A" * 4_000_000, 1_500_000)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "'file' URLs are not allowed"),
        ("ftp://media.test/a", "'ftp' URLs are not allowed"),
        ("gs://bucket/a", "'gs' URLs are not allowed"),
        ("javascript:alert(1)", "'javascript' URLs are not allowed"),
        ("blob:https://media.test/a", "'blob' URLs are not allowed"),
        ("view-source:https://media.test/", "'view-source' URLs are not allowed"),
        ("httpss://media.test/", "'httpss' URLs are not allowed"),
        (" https://media.test/", "' https' URLs are not allowed"),
        ("\thttps://media.test/", "'?https' URLs are not allowed"),
        ("x" * 70 + "://media.test/", "'" + "x" * 60 + "...' URLs are not allowed"),
        ("x" * 1_000_000 + "://media.test/", "the URL has no scheme"),
        ("media.test/a.png", "the URL has no scheme"),
        ("//media.test/a.png", "the URL has no scheme"),
        ("/etc/passwd", "the URL has no scheme"),
        ("https", "the URL has no scheme"),
        ("data", "the URL has no scheme"),
        ("", "the URL has no scheme"),
    ],
)
def test_other_schemes_are_refused_by_name(url, message, names):
    with refused(message):
        asyncio.run(read_media(url, limits("media.test")))
    assert not names.asked


def test_messages_say_what_to_send():
    with refused("'ftp' URLs are not allowed; send the file as a data: URL or an https: URL"):
        asyncio.run(read_media("ftp://media.test/", limits("media.test")))
    with pytest.raises(RefusedMedia, match="send the file as a data: URL$"):
        asyncio.run(read_media("ftp://media.test/", limits()))


def test_a_refusal_survives_pickling():
    copy = pickle.loads(pickle.dumps(RefusedMedia("too slow", 504)))
    assert (str(copy), copy.message, copy.status) == ("too slow", "too slow", 504)


def test_the_module_is_light():
    code = "import serve.media, sys; print({'ray', 'torch', 'numpy', 'transformers'} & set(sys.modules))"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout == "set()\n"


# --- which URLs and addresses are allowed


@pytest.mark.parametrize("address", PRIVATE_ADDRESSES.split())
def test_private_addresses(address):
    assert not is_public(ip_address(address))


@pytest.mark.parametrize("address", PUBLIC_ADDRESSES.split())
def test_public_addresses(address):
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "entry", ["https://a.org", "a.org/", "*", "*.", "a.*.org", "*.*.org", "a b", "A.org", "münchen.de"]
)
def test_an_allowed_host_that_could_never_match_is_a_mistake(entry):
    with pytest.raises(UsageError, match="allowed host"):
        limits("a.org", entry)


@pytest.mark.parametrize(
    "entry", ["::1", "a.org:", "a.org:http", "a.org:123456", ":80", "", "a..org", ".org", "a.org\n"]
)
def test_so_is_one_without_a_clear_port(entry):
    with pytest.raises(UsageError, match="allowed host"):
        limits(entry)


@pytest.mark.parametrize(
    ("url", "hosts"),
    [
        ("https://a.org/x.png", ["a.org"]),
        ("http://a.org", ["b.org", "a.org"]),
        ("HTTPS://A.ORG/", ["a.org"]),
        ("https://a.org:443/", ["a.org"]),
        ("http://a.org:80/", ["a.org"]),
        ("http://a.org:8080/", ["a.org:8080"]),
        ("http://a.org:81/", ["a.org", "a.org:81"]),
        ("https://a.org/", ["a.org", "a.org:81"]),
        ("https://x.a.org/", ["*.a.org"]),
        ("https://x.y.a.org:8443/", ["*.a.org:8443"]),
        ("https://x_1-.a.org/", ["*.a.org"]),
        ("https://xn--mnchen-3ya.de/", ["xn--mnchen-3ya.de"]),
        ("https://8.8.8.8/", ["8.8.8.8"]),
        ("https://[2606:4700::1111]/", ["[2606:4700::1111]"]),
        ("https://[2606:4700::1111]:8443/", ["[2606:4700::1111]:8443"]),
        ("https://a.org/@b.org?u=http://c.org#d", ["a.org"]),
    ],
)
def test_allowed_urls(url, hosts):
    assert check_url(url, limits(*hosts)) == URL(url, encoded=True)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        # user information
        ("https://a.org@127.0.0.1/", "user name"),
        ("https://a.org:443@evil.test/", "user name"),
        ("https://user@a.org/", "user name"),
        ("https://:secret@a.org/", "user name"),
        ("https://a.org@evil.test@a.org/", "user name"),
        # characters that parsers disagree on
        ("https://a.org\\@evil.test/", "a backslash"),
        ("https://evil.test\\.a.org/", "a backslash"),
        ("https:\\\\a.org/", "a backslash"),
        ("https://a.org /", "a blank"),
        ("https://a.org/ x", "a blank"),
        ("https://a.or\tg/", "a blank"),
        ("https://a.org\n.evil.test/", "a blank"),
        ("https://a.org/\r\nHost: evil.test", "a blank"),
        ("https://a.org/\n", "a blank"),
        ("https://a.org\0.evil.test/", "a blank"),
        ("https://a.org/\x7f", "a blank"),
        ("https://ａ.org/", "outside of ASCII"),
        ("https://a。org/", "outside of ASCII"),
        ("https://①②⑦.⓪.⓪.①/", "outside of ASCII"),
        ("https://\u0430.org/", "outside of ASCII"),  # a Cyrillic a
        ("https://a\u00ad.org/", "outside of ASCII"),  # a soft hyphen, which IDNA drops
        ("https://a.org/\ud800", "outside of ASCII"),
        # other hosts
        ("https://evil.test/", "host 'evil.test' is not in the allow-list"),
        ("https://a.org.evil.test/", "not in the allow-list"),
        ("https://xa.org/", "not in the allow-list"),
        ("https://x.a.org/", "not in the allow-list"),
        ("https://org/", "not in the allow-list"),
        ("https://a.org./", "not in the allow-list"),
        ("https://a%2eorg/", "not in the allow-list"),
        ("https://xn--80a.org/", "not in the allow-list"),
        ("https://evil.test#@a.org/", "not in the allow-list"),
        ("https://evil.test?@a.org/", "not in the allow-list"),
        ("https://evil.test/@a.org/", "not in the allow-list"),
        ("https://" + "x" * 300 + "/", "host '" + "x" * 60 + "...' is not in the allow-list"),
        ("https://127.0.0.1/", "host '127.0.0.1' is not in the allow-list"),
        ("https://2130706433/", "host '2130706433' is not in the allow-list"),
        ("https://[::1]/", "host '[::1]' is not in the allow-list"),
        ("https://[::ffff:127.0.0.1]/", "host '[::ffff:127.0.0.1]' is not in the allow-list"),
        # below the wildcard
        ("https://w.org/", "not in the allow-list"),
        ("https://.w.org/", "not in the allow-list"),
        ("https://x..w.org/", "not in the allow-list"),
        ("https://xw.org/", "not in the allow-list"),
        ("https://x.w.org.evil.test/", "not in the allow-list"),
        ("https://evil.test%2f.w.org/", "not in the allow-list"),
        ("https://evil.test%00.w.org/", "not in the allow-list"),
        ("https://evil.test,x.w.org/", "not in the allow-list"),
        ("https://" + "x" * 64 + ".w.org/", "not in the allow-list"),
        # no host, no port, another port
        ("https:a.org", "not in the allow-list"),
        ("https:/a.org", "not in the allow-list"),
        ("https:///a.org", "not in the allow-list"),
        ("https:", "not in the allow-list"),
        ("https://[::1", "the URL is malformed"),
        ("https://[a.org]/", "the URL is malformed"),
        ("https://a.org:99999/", "the URL is malformed"),
        ("https://a.org:x/", "the URL is malformed"),
        ("https://a.org:80:80/", "the URL is malformed"),
        ("https://a.org:22/", "port 22 of host 'a.org' is not in the allow-list"),
        ("https://a.org:8080/", "port 8080 of host 'a.org' is not in the allow-list"),
        ("https://a.org:0/", "port 0 of host 'a.org' is not in the allow-list"),
        ("https://p.org/", "port 443 of host 'p.org' is not in the allow-list"),
        ("https://x.w.org:81/", "port 81 of host 'x.w.org' is not in the allow-list"),
        ("https://a.org/" + "x" * MAX_URL, f"longer than {MAX_URL} characters"),
    ],
)
def test_refused_urls_cost_no_name_lookup(url, message, names):
    with refused(message):
        asyncio.run(read_media(url, limits("a.org", "*.w.org", "p.org:8443")))
    assert not names.asked


@pytest.mark.parametrize("url", ["http://media.test/a.png", "https://media.test/", "HTTP://127.0.0.1/"])
def test_without_allowed_hosts_nothing_is_fetched(url, names):
    with refused("remote URLs are not allowed here; send the file as a data: URL"):
        asyncio.run(read_media(url, limits()))
    assert not names.asked


@pytest.mark.parametrize("address", ["::1", "::ffff:7f00:1", "fe80::1", "64:ff9b::7f00:1", "2002:7f00:1::", "fc00::1"])
def test_listed_ipv6_addresses_have_to_be_public_too(address):
    with refused(f"host '[{address}]' is at an address that is not allowed"):
        asyncio.run(fetch(f"http://[{address}]/", limits(f"[{address}]")))


@pytest.mark.parametrize("host", OTHER_NOTATIONS_OF_LOOPBACK)
def test_listed_numbers_have_to_be_public_addresses_too(host):
    with refused(f"host '{host}' is at an address that is not allowed"):
        asyncio.run(fetch(f"http://{host}/", limits(host)))


@asynchronous
async def test_listed_ipv4_addresses_have_to_be_public_too():
    async with site({"body": FILE}) as server:
        url, allowed = f"http://{PUBLIC}:{server.port}/", limits(f"{PUBLIC}:{server.port}")
        assert await fetch(url, allowed, is_allowed_address=is_local_public) == FILE
        with refused(f"host '{PUBLIC}' is at an address that is not allowed"):
            await fetch(url, allowed)
        assert len(server.requests) == 1


def test_redirects_are_checked_against_the_url_before():
    base = URL("https://a.org/x/y")
    check = functools.partial(check_url, limits=limits("a.org", "b.org"), base=base)
    assert str(check("z?q#f")) == "https://a.org/x/z?q#f"
    assert str(check("//b.org/z")) == "https://b.org/z"
    with refused("the https: URL redirects to an http: URL"):
        check("http://a.org/x/y")
    assert str(check_url("https://a.org/", limits("a.org"), base=URL("http://a.org/"))) == "https://a.org/"
    with refused("host 'evil.test' is not in the allow-list"):
        check("//evil.test/")
    with refused("'data' URLs are not allowed"):
        check("data:;base64,QUJD")


# --- names and their addresses


@pytest.mark.parametrize("address", [a for a in PRIVATE_ADDRESSES.split() if "%" not in a])
def test_names_of_private_addresses_are_refused(address, names):
    names.answers["media.test"] = [[address]]
    with refused("host 'media.test' is at an address that is not allowed"):
        asyncio.run(read_media("http://media.test/", limits("media.test")))
    assert names.asked == ["media.test"]


@pytest.mark.parametrize("answer", [[PUBLIC, PRIVATE], [PRIVATE, PUBLIC], [PUBLIC, "::1"]])
@asynchronous
async def test_one_private_address_among_public_ones_is_enough(answer, names):
    async with site({"body": FILE}) as server:
        assert await get(server.port) == FILE
        names.answers["media.test"] = [answer]
        with refused("host 'media.test' is at an address that is not allowed"):
            await get(server.port)
        assert len(server.requests) == 1


@asynchronous
async def test_the_address_that_was_checked_is_the_one_connected_to(names):
    async with site({"body": FILE}) as public, site({"body": b"secret"}, PRIVATE, public.port) as private:
        names.answers["media.test"] = [[PUBLIC], [PRIVATE]]
        assert await get(public.port) == FILE
        assert names.asked == ["media.test"]
        with refused("host 'media.test' is at an address that is not allowed"):
            await get(public.port)
        assert (len(public.requests), len(private.requests)) == (1, 0)
        assert await get(public.port, allowed=lambda address: True) == b"secret"


@asynchronous
async def test_a_name_is_checked_again_after_a_redirect_to_itself(names):
    async with (
        site(lambda request: redirect("/b")) as public,
        site({"body": b"secret"}, PRIVATE, public.port) as private,
    ):
        names.answers["media.test"] = [[PUBLIC], [PRIVATE]]
        with refused("host 'media.test' is at an address that is not allowed"):
            await get(public.port)
        assert (len(public.requests), len(private.requests)) == (1, 0)


@asynchronous
async def test_localhost_of_the_system():
    async with site({"body": FILE}) as server:
        assert await get(server.port, host="localhost", allowed=lambda address: address.is_loopback) == FILE
        with refused("host 'localhost' is at an address that is not allowed"):
            await get(server.port, host="localhost", allowed=is_public)


@asynchronous
async def test_unknown_names_and_closed_ports(names):
    with refused("could not be fetched: the name of its host is unknown"):
        await get(80, host="nowhere.test")
    label = "x" * 63
    with refused("could not be fetched: the name of its host is unknown"):
        await get(80, host=".".join([label] * 6))
    with socket.socket() as unused:
        unused.bind((PUBLIC, 0))  # bound, but nobody listens
        with refused("could not be fetched: no connection to its host"):
            await get(unused.getsockname()[1])


# --- fetching


@asynchronous
async def test_a_file_is_fetched_with_a_plain_request(names, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    async with site({"body": FILE}) as server:
        path = "/a%2Fb%7e/../c?key=%2f+%2B&sig=a%3D"
        assert await get(server.port, path + "#fragment") == FILE
        request = server.requests[0]
        assert (request.method, request.raw_path) == ("GET", path)
        assert request.headers["Accept-Encoding"] == "identity"
        assert request.headers["Host"] == f"media.test:{server.port}"
        assert not {"Cookie", "Authorization", "Referer"} & set(request.headers)


@pytest.mark.parametrize("chunked", [False, True])
@asynchronous
async def test_the_size_limit_is_exact(names, chunked):
    async def answer(request):
        response = web.StreamResponse()
        if chunked:
            response.enable_chunked_encoding()
        else:
            response.content_length = len(FILE)
        await response.prepare(request)
        with suppress(ConnectionError):
            await response.write(FILE)
        return response

    async with site(answer) as server:
        assert await get(server.port, max_bytes=len(FILE)) == FILE
        with refused("the file is larger than 0.002047 MB", 413):
            await get(server.port, max_bytes=len(FILE) - 1)


@asynchronous
async def test_a_declared_size_is_refused_before_the_body(names):
    async with raw_site(OK + b"Content-Length: 100001\r\n\r\n", b"", pause=5) as port:
        started = time.monotonic()
        with refused("the file is larger than 0.1 MB", 413):
            await get(port)
        assert time.monotonic() - started < 2


@asynchronous
async def test_a_body_longer_than_declared_is_not_read(names):
    async with raw_site(OK + b"Content-Length: 5\r\n\r\n", b"x" * 5000) as port:
        try:
            assert await get(port, max_bytes=1000) == b"x" * 5
        except RefusedMedia as error:  # as strict parsers do
            assert error.status == 400


@pytest.mark.parametrize("head", [OK + b"\r\n", OK + b"Transfer-Encoding: chunked\r\n\r\n"])
@asynchronous
async def test_endless_bodies_are_cut_at_the_limit(names, head):
    sent = 0

    async def answer(reader, writer):
        nonlocal sent
        with suppress(ConnectionError):
            writer.write(head)
            while sent < 200_000_000:
                writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                await writer.drain()
                sent += 65536
        writer.close()

    server = await asyncio.start_server(answer, PUBLIC, 0)
    with refused("the file is larger than 0.1 MB", 413):
        await get(server.sockets[0].getsockname()[1])
    server.close()
    assert 100_000 < sent < 20_000_000  # what buffers of the system hold comes on top


@pytest.mark.parametrize(
    ("pieces", "pause"),
    [
        ([OK + b"Content-Length: 1000\r\n\r\n", *[b"x"] * 100], 0.05),
        ([OK + b"Transfer-Encoding: chunked\r\n\r\n", *[b"1\r\nx\r\n"] * 100], 0.05),
        ([OK, *[b"X: x\r\n"] * 100], 0.05),
        ([b"HTTP/1.1 100 Continue\r\n\r\n"] * 100, 0.05),
        ([b""], 5),
    ],
    ids=["body", "chunks", "headers", "continue", "silence"],
)
@asynchronous
async def test_slow_servers_hit_the_time_limit(names, pieces, pause):
    async with raw_site(*pieces, pause=pause) as port:
        started = time.monotonic()
        with refused("the file did not arrive within 0.5 s", 504):
            await get(port, seconds=0.5)
        assert 0.45 < time.monotonic() - started < 1.5


@asynchronous
async def test_redirects_share_one_time_limit(names):
    async def answer(request):
        await asyncio.sleep(0.3)
        return redirect("/again")

    async with site(answer) as server:
        started = time.monotonic()
        with refused("the file did not arrive within 0.5 s", 504):
            await get(server.port, seconds=0.5, redirects=10)
        assert 0.45 < time.monotonic() - started < 1.5
        assert len(server.requests) == 2


@asynchronous
async def test_slow_name_lookups_hit_the_time_limit(names):
    names.seconds = 1.0
    started = time.monotonic()
    with refused("the file did not arrive within 0.2 s", 504):
        await get(80, seconds=0.2)
    assert 0.15 < time.monotonic() - started < 0.8


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "br", "deflate", "zstd", "identity, gzip"])
@asynchronous
async def test_compressed_bodies_are_refused(names, encoding):
    bomb = gzip.compress(bytes(10_000_000))
    async with raw_site(
        OK + f"Content-Encoding: {encoding}\r\nContent-Length: {len(bomb)}\r\n\r\n".encode() + bomb
    ) as port:
        with refused("host 'media.test' sent the file compressed"):
            await get(port)


@asynchronous
async def test_a_gzip_file_is_not_unpacked(names):
    bomb = gzip.compress(bytes(10_000_000))
    async with site({"body": bomb, "headers": {"Content-Encoding": "identity"}}) as server:
        assert await get(server.port) == bomb


@pytest.mark.parametrize("status", [201, 204, 206, 300, 304, 400, 401, 404, 500, 503])
@asynchronous
async def test_other_statuses_are_refused(names, status):
    async with site({"status": status, "reason": "internal"}) as server:
        with refused(f"host 'media.test' answered with status {status}"):
            await get(server.port)


@asynchronous
async def test_an_empty_file_is_refused(names):
    async with site({"body": b""}) as server:
        with refused("host 'media.test' sent an empty file"):
            await get(server.port)


BROKEN = {
    "body cut off": [OK + b"Content-Length: 10\r\n\r\n", b"abc"],
    "chunk cut off": [OK + b"Transfer-Encoding: chunked\r\n\r\n", b"10\r\nabc"],
    "headers cut off": [OK + b"Content-Le"],
    "nothing": [],
    "not HTTP": [b"SSH-2.0-OpenSSH_9.2\r\n\r\n"],
    "bad length": [OK + b"Content-Length: -2\r\n\r\nabc"],
    "two framings": [OK + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"],
    "huge header": [OK + b"X: " + b"x" * 100_000 + b"\r\n\r\n"],
}


@pytest.mark.parametrize("pieces", BROKEN.values(), ids=BROKEN)
@asynchronous
async def test_broken_answers_are_refused(names, pieces):
    async with raw_site(*pieces) as port:
        with refused("could not be fetched: the connection broke, or the answer is not valid HTTP"):
            await get(port)


@asynchronous
async def test_a_bad_chunk_is_refused_by_the_parser_without_extensions_too(names, monkeypatch):
    monkeypatch.setattr(aiohttp.client_proto, "HttpResponseParser", http_parser.HttpResponseParserPy)
    async with raw_site(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"zz\r\nabc\r\n", pause=0.1) as port:
        with refused("could not be fetched: the connection broke, or the answer is not valid HTTP"):
            await get(port)


@asynchronous
async def test_certificates_are_verified(names, tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "media.test")])
    now = datetime.now(UTC)
    certificate = x509.CertificateBuilder(
        name, name, key.public_key(), 1, now - timedelta(days=1), now + timedelta(days=1)
    ).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "both.pem").write_bytes(secret + certificate.public_bytes(pem))
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(tmp_path / "both.pem")
    async with site({"body": FILE}, tls=tls) as server:
        with refused("could not be fetched: no TLS connection with a valid certificate"):
            await fetch(
                f"https://media.test:{server.port}/",
                limits(f"media.test:{server.port}"),
                is_allowed_address=is_local_public,
            )
        assert not server.requests


# --- redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@asynchronous
async def test_redirects_are_followed(names, status):
    def answer(request):
        return web.Response(body=FILE) if request.path == "/x/end" else redirect("end", status)

    async with site(answer) as server:
        assert await get(server.port, "/x/start") == FILE
        assert [request.path for request in server.requests] == ["/x/start", "/x/end"]


@asynchronous
async def test_redirects_carry_no_cookies_to_another_allowed_host(names):
    def answer(request):
        if request.host.startswith("other.test"):
            return web.Response(body=FILE)
        response = redirect(f"http://other.test:{server.port}/")
        response.headers["Set-Cookie"] = "a=b; Domain=test"
        return response

    async with site(answer) as server:
        hosts = [f"{name}:{server.port}" for name in ("media.test", "other.test")]
        found = await fetch(f"http://{hosts[0]}/", limits(*hosts), is_allowed_address=is_local_public)
        assert found == FILE
        assert [request.host for request in server.requests] == hosts
        assert not any("Cookie" in request.headers for request in server.requests)


@pytest.mark.parametrize("redirects", [0, 2])
@asynchronous
async def test_loops_end(names, redirects):
    async with site(lambda request: redirect("/again")) as server:
        with refused(f"the URL redirects more than {redirects} times"):
            await get(server.port, redirects=redirects)
        assert len(server.requests) == redirects + 1


@asynchronous
async def test_as_many_redirects_as_allowed(names):
    async with site(
        lambda r: web.Response(body=FILE) if r.path == "/3" else redirect(f"/{int(r.path[1:]) + 1}")
    ) as server:
        assert await get(server.port, "/0", redirects=3) == FILE
        with refused("the URL redirects more than 2 times"):
            await get(server.port, "/0", redirects=2)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("http://evil.test/", "host 'evil.test' is not in the allow-list"),
        ("//evil.test/", "host 'evil.test' is not in the allow-list"),
        ("http://media.test/", "port 80 of host 'media.test' is not in the allow-list"),
        ("http://media.test@evil.test/", "user name"),
        ("http://media.test\\@evil.test/", "a backslash"),
        ("http://media.test:1/", "port 1 of host"),
        ("file:///etc/passwd", "'file' URLs are not allowed"),
        ("ftp://media.test/", "'ftp' URLs are not allowed"),
        ("data:;base64,QUJD", "'data' URLs are not allowed"),
        ("http://[::1", "the URL is malformed"),
        ("http://ünï.test/", "outside of ASCII"),
    ],
)
@asynchronous
async def test_redirects_to_what_is_not_allowed(names, location, message):
    async with site(lambda request: redirect(location)) as server:
        with refused(message):
            await get(server.port)
        assert names.asked == ["media.test"]
        assert len(server.requests) == 1


@asynchronous
async def test_a_redirect_to_nowhere(names):
    async with site({"status": 302}) as server:
        with refused("host 'media.test' answered with status 302"):
            await get(server.port)
        assert len(server.requests) == 1


@pytest.mark.parametrize("target", [PRIVATE, "private.test"])
@asynchronous
async def test_redirects_to_a_private_address(names, target):
    names.answers["private.test"] = [[PRIVATE]]
    async with (
        site({"body": b"secret"}, PRIVATE) as private,
        site(lambda request: redirect(f"http://{target}:{private.port}/")) as public,
    ):
        url = f"http://media.test:{public.port}/"
        allowed = limits(f"media.test:{public.port}", f"{target}:{private.port}")
        with refused(f"host '{target}' is at an address that is not allowed"):
            await fetch(url, allowed, is_allowed_address=is_local_public)
        assert (len(public.requests), len(private.requests)) == (1, 0)
        assert await fetch(url, allowed, is_allowed_address=lambda address: True) == b"secret"
