"""Fetching what is behind media URLs: real servers on loopback, with every trick that they may try."""

from __future__ import annotations

import asyncio
import gzip
import socket
import ssl
import struct
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import aiohttp
import pytest
from aiohttp import http_parser, web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from serve.media import (
    RefusedMedia,
    fetch,
    is_public,
    read_media,
)
from tests.serving.sites import (
    FILE,
    OK,
    PRIVATE,
    PRIVATE_ADDRESSES,
    PUBLIC,
    asynchronous,
    get,
    is_local_public,
    limits,
    raw_site,
    redirect,
    refused,
    site,
)

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
    async with raw_site(OK + b"Content-Length: 100001\r\n\r\n", pause=3600) as port:  # No body ever comes.
        with refused("the file is larger than 0.1 MB", 413):
            await get(port)


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
    "pieces",
    [
        [OK + b"Content-Length: 1000\r\n\r\n", *[b"x"] * 100],
        [OK + b"Transfer-Encoding: chunked\r\n\r\n", *[b"1\r\nx\r\n"] * 100],
        [OK, *[b"X: x\r\n"] * 100],
        [b"HTTP/1.1 100 Continue\r\n\r\n"] * 100,
        [b""] * 100,
    ],
    ids=["body", "chunks", "headers", "continue", "silence"],
)
@asynchronous
async def test_slow_servers_hit_the_time_limit(names, pieces):
    sent = []
    async with raw_site(*pieces, pause=0.05, sent=sent) as port:
        started = time.monotonic()
        with refused("the file did not arrive within 0.5 s", 504):
            await get(port, seconds=0.5)
        assert time.monotonic() - started > 0.45
        assert len(sent) < 30  # 1.5 s, unless all stood still


@asynchronous
async def test_redirects_share_one_time_limit(names):
    async def answer(request):
        await asyncio.sleep(0.3)
        return redirect("/again")

    async with site(answer) as server:
        started = time.monotonic()
        with refused("the file did not arrive within 1.5 s", 504):
            await get(server.port, seconds=1.5, redirects=10)
        assert time.monotonic() - started > 1.45
        assert 2 <= len(server.requests) <= 6


@asynchronous
async def test_slow_name_lookups_hit_the_time_limit(names):
    names.open.clear()  # It says nothing as long as the file is waited for.
    started = time.monotonic()
    try:
        with refused("the file did not arrive within 0.2 s", 504):
            await get(80, seconds=0.2)
    finally:
        names.open.set()
    assert time.monotonic() - started > 0.15 and names.asked == ["media.test"]


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


@pytest.mark.parametrize("head", [b"", OK + b"Content-Length: 10\r\n\r\nabc"], ids=["at once", "in the body"])
@asynchronous
async def test_a_connection_that_is_reset_is_refused(names, head):
    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head)
        await asyncio.sleep(0.1)
        linger_no_time = struct.pack("ii", 1, 0)  # a reset in place of an orderly end
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_no_time)
        writer.close()

    server = await asyncio.start_server(answer, PUBLIC, 0)
    with refused("could not be fetched: the connection broke, or the answer is not valid HTTP"):
        await get(server.sockets[0].getsockname()[1])
    server.close()


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
