"""From the URL in a request part to the bytes of a media file. The URL is untrusted: what is not listed is refused.

Light on purpose: it runs in the HTTP ingress, where neither torch nor the model is loaded.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import aiohttp
import pybase64
from aiohttp.abc import ResolveResult
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL  # aiohttp's own: no second parser that could read a URL in another way

from unimoe_ray.errors import UsageError

MAX_URL = 8192  # characters of a remote URL
MAX_DATA_HEADER = 256  # characters up to the comma of a data: URL
_NAME = r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*"
_ENTRY = re.compile(rf"(?P<host>(\*\.)?{_NAME}|\[[0-9a-f:.]+\])(:(?P<port>[0-9]{{1,5}}))?")
_GLOBAL_UNICAST = ip_network("2000::/3")
_NAT64 = ip_network("64:ff9b::/96")
# Global in Python's tables, but answered within a network: protocol assignments, some cloud's metadata; Azure's agent.
_INTERNAL = (ip_network("192.0.0.0/24"), ip_network("168.63.129.16/32"))

Address = IPv4Address | IPv6Address
AddressCheck = Callable[[Address], bool]


class RefusedMedia(Exception):
    """A file that is not accepted, with one line for the client and an HTTP status.

    400: not allowed, malformed, or not to be had from the other server; 413: too large; 504: too slow.
    """

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.message, self.status = message, status


@dataclass(frozen=True)
class FetchLimits:
    """What may be fetched. Raises UsageError for an entry of ``hosts`` that could never match."""

    max_bytes: int
    seconds: float  # for all of it: name lookup, redirects and body
    hosts: tuple[str, ...]  # a.org, *.a.org (subdomains only) or [2001:db8::1]: ports 80 and 443; a.org:81: that port
    redirects: int = 3

    def __post_init__(self) -> None:
        for entry in self.hosts:
            if not _ENTRY.fullmatch(entry):
                raise UsageError(
                    f"allowed host {entry!r}: use a.org, *.a.org or [IPv6], in lower case, with or without :port"
                )


async def read_media(url: str, limits: FetchLimits) -> bytes:
    """The file that a ``data:``, ``https:`` or ``http:`` URL stands for. Raises RefusedMedia."""
    scheme, colon, _ = url[:80].lower().partition(":")
    if colon and scheme == "data":
        return decode_data_url(url, limits.max_bytes)
    if colon and scheme in ("http", "https"):
        return await fetch(url, limits)
    problem = f"{_shown(scheme)} URLs are not allowed" if colon else "the URL has no scheme"
    raise RefusedMedia(f"{problem}; send the file as a data: URL" + (" or an https: URL" if limits.hosts else ""))


def decode_data_url(url: str, max_bytes: int) -> bytes:
    """The content of ``data:[type][;parameters];base64,<base64>``; the type is not judged. Raises RefusedMedia."""
    comma = url.find(",", 0, MAX_DATA_HEADER)
    if url[:5].lower() != "data:" or comma < 0 or not url[5:comma].lower().endswith(";base64"):
        raise RefusedMedia("the data: URL is not of the form data:<type>;base64,<base64>")
    return decode_base64(url, max_bytes, start=comma + 1)


def decode_base64(text: str, max_bytes: int, start: int = 0) -> bytes:
    """The bytes in ``text[start:]``: standard alphabet, padded, no whitespace, not empty. Raises RefusedMedia.

    The size is known, and checked, before anything is copied or decoded.
    """
    length = len(text) - start
    if length // 4 * 3 - text.count("=", max(start, len(text) - 2)) > max_bytes:
        raise _too_large(max_bytes)
    if not length:
        raise RefusedMedia("the base64 data is empty")
    if length % 4:
        raise RefusedMedia(f"{length} characters of base64, not a multiple of 4: it is cut off or lacks its padding")
    try:
        return pybase64.b64decode(text[start:], validate=True)
    except ValueError:
        raise RefusedMedia("malformed base64: only A-Z a-z 0-9 + / and final = are allowed, no line breaks") from None


def is_public(address: Address) -> bool:
    """Whether ``address`` is of the public internet; so must be an IPv4 address that an IPv6 address stands for."""
    if isinstance(address, IPv6Address):
        carried = address.ipv4_mapped or (IPv4Address(address.packed[12:]) if address in _NAT64 else None)
        if carried is not None:
            return is_public(carried)
        # Python's tables call global what they do not know. Teredo they do know, as private.
        if address not in _GLOBAL_UNICAST or (address.sixtofour is not None and not is_public(address.sixtofour)):
            return False
    elif any(address in network for network in _INTERNAL):
        return False
    return address.is_global and not address.is_multicast  # what is reserved is not global


async def fetch(url: str, limits: FetchLimits, *, is_allowed_address: AddressCheck = is_public) -> bytes:
    """The body behind an ``http:`` or ``https:`` URL, redirects followed. Raises RefusedMedia.

    Its host has to be in ``limits.hosts``, and every address that the host has must be allowed.
    """
    if not limits.hosts:
        raise RefusedMedia("remote URLs are not allowed here; send the file as a data: URL")
    try:
        async with asyncio.timeout(limits.seconds):
            return await _follow(url, limits, is_allowed_address)
    except TimeoutError:
        raise RefusedMedia(f"the file did not arrive within {limits.seconds:g} s", 504) from None
    except (aiohttp.ClientError, HttpProcessingError, OSError) as error:
        raise RefusedMedia(f"the file could not be fetched: {_reason(error)}") from None


def check_url(
    text: str, limits: FetchLimits, is_allowed_address: AddressCheck = is_public, base: URL | None = None
) -> URL:
    """``text`` parsed, if all that can be judged without a name lookup is allowed. Raises RefusedMedia.

    ``base`` is the URL that redirects to ``text``.
    """
    if len(text) > MAX_URL:
        raise RefusedMedia(f"the URL is longer than {MAX_URL} characters")
    if not re.fullmatch(r"[!-~]*", text) or "\\" in text:
        raise RefusedMedia("the URL has a blank, a backslash or a character outside of ASCII; percent-encode it")
    try:
        url = URL(text, encoded=True)  # the path goes out as it came: it may be signed
        url = base.join(url) if base is not None else url
        host = (url.host_subcomponent or "").lower()
        address = _literal_address(host)
    except ValueError:
        raise RefusedMedia("the URL is malformed") from None
    if url.scheme not in ("http", "https"):
        raise RefusedMedia(f"{_shown(url.scheme)} URLs are not allowed; only https: and http: are fetched")
    if base is not None and base.scheme == "https" and url.scheme == "http":
        raise RefusedMedia("the https: URL redirects to an http: URL")
    if url.raw_user is not None or url.raw_password is not None:
        raise RefusedMedia("a URL with a user name or password is not allowed")
    ports = [entry["port"] for entry in map(_ENTRY.fullmatch, limits.hosts) if _matches(host, entry["host"])]
    if not ports:
        raise RefusedMedia(f"host {_shown(host)} is not in the allow-list")
    if not any(url.port in (80, 443) if port is None else url.port == int(port) for port in ports):
        raise RefusedMedia(f"port {url.port} of host {_shown(host)} is not in the allow-list")
    if address is not None and not is_allowed_address(address):
        raise _not_allowed(host)
    return url


class _CheckedResolver(aiohttp.ThreadedResolver):
    """Names to addresses, if all of them are allowed. aiohttp connects to these, without a second lookup."""

    def __init__(self, is_allowed_address: AddressCheck):
        super().__init__()
        self._is_allowed_address = is_allowed_address

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await super().resolve(host, port, family)
        if not all(self._is_allowed_address(ip_address(result["host"])) for result in found):
            raise _not_allowed(host)
        return found


async def _follow(text: str, limits: FetchLimits, is_allowed_address: AddressCheck) -> bytes:
    url = check_url(text, limits, is_allowed_address)
    resolver = _CheckedResolver(is_allowed_address)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False, force_close=True),
        headers={"Accept-Encoding": "identity", "User-Agent": "unimoe_ray"},
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(),  # none: the caller's is for everything
        auto_decompress=False,
        trust_env=False,
    ) as session:
        for _ in range(limits.redirects + 1):
            async with session.get(url, allow_redirects=False) as response:
                if response.status not in (301, 302, 303, 307, 308) or "Location" not in response.headers:
                    return await _body(response, limits.max_bytes)
                url = check_url(response.headers["Location"], limits, is_allowed_address, base=url)
    raise RefusedMedia(f"the URL redirects more than {limits.redirects} times")


async def _body(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    host = _shown(response.url.raw_host or "")
    if response.status != 200:
        raise RefusedMedia(f"host {host} answered with status {response.status}")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise RefusedMedia(f"host {host} sent the file compressed, which was not asked for")
    if (response.content_length or 0) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    async for chunk in response.content.iter_chunked(2**16):
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    if not body:
        raise RefusedMedia(f"host {host} sent an empty file")
    return bytes(body)


def _literal_address(host: str) -> Address | None:
    """The address that ``host`` is, if it is one, in any notation that the C library reads: 0x7f.1, 2130706433."""
    if host.startswith("["):
        return ip_address(host[1:-1])
    try:
        return IPv4Address(socket.inet_aton(host))
    except OSError:
        return None


def _matches(host: str, pattern: str) -> bool:
    if pattern.startswith("*"):
        return host.endswith(pattern[1:]) and re.fullmatch(_NAME, host) is not None
    return host == pattern


def _not_allowed(host: str) -> RefusedMedia:
    return RefusedMedia(f"host {_shown(host)} is at an address that is not allowed")


def _too_large(max_bytes: int) -> RefusedMedia:
    return RefusedMedia(f"the file is larger than {max_bytes / 1e6:g} MB", 413)


def _reason(error: Exception) -> str:
    """What failed, in our words: those of the error may name addresses."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "the name of its host is unknown"
    if isinstance(error, aiohttp.ClientSSLError):
        return "no TLS connection with a valid certificate"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "no connection to its host"
    return "the connection broke, or the answer is not valid HTTP"


def _shown(text: str) -> str:
    """At most 60 characters of ``text``, harmless in a log."""
    return "'" + re.sub("[^ -~]", "?", text[:60]) + ("...'" if len(text) > 60 else "'")
