"""URLs in requests: which are accepted, and that everything else is refused before it costs anything."""

from __future__ import annotations

import asyncio
import base64
import functools
import pickle
import subprocess
import sys
import tracemalloc
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from yarl import URL

from serve.media import (
    MAX_DATA_HEADER,
    MAX_URL,
    RefusedMedia,
    check_url,
    decode_base64,
    decode_data_url,
    fetch,
    is_public,
    read_media,
)
from tests.serving.sites import (
    FILE,
    OTHER_NOTATIONS_OF_LOOPBACK,
    PRIVATE_ADDRESSES,
    PUBLIC,
    PUBLIC_ADDRESSES,
    asynchronous,
    is_local_public,
    limits,
    refused,
    site,
)
from unimoe_ray.errors import UsageError

# --- data: URLs and base64


@pytest.mark.parametrize("start", ["data:image/png;base64,", "data:;base64,", "DATA:audio/wav;codecs=1;BASE64,"])
def test_data_urls_are_decoded(start):
    url = start + base64.b64encode(FILE).decode()
    assert decode_data_url(url, len(FILE)) == FILE
    assert asyncio.run(read_media(url, limits(max_bytes=len(FILE)))) == FILE


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=1, max_size=2000))
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
        ("QUJD====", "malformed base64"),
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


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=400, max_size=2000), st.floats(0, 1, exclude_max=True), st.sampled_from("=-_ \n\0.~\x80é"))
def test_one_wrong_character_anywhere_in_a_long_text_is_found(content, place, character):
    text = base64.b64encode(content[: len(content) // 3 * 3]).decode()
    at = int(place * (len(text) - 2))  # not where padding may be
    with refused("malformed base64"):
        decode_base64(text[:at] + character + text[at + 1 :], 2000)


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
