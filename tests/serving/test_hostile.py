"""Requests that mean no good, against a real endpoint: each is refused in one line, and nothing else suffers."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import requests
from hypothesis import HealthCheck, given, settings

from tests.serving.conftest import Endpoint
from tests.serving.hostile_media import (
    PLAYLISTS,
    gif_that_claims,
    half,
    many_channels,
    picture_as,
    png_that_claims,
    sound_as,
    tiff_that_claims,
    video_of,
    wav_of,
    written,
)
from tests.serving.media import image, input_audio, mp4, png, sound, text, video, wav
from unimoe_ray.data.prompt import plain_text
from unimoe_ray.data.tokenizer import load_tokenizer

HEALTH = list(HealthCheck)  # Strategies of others may be slow, and may not.
DEPLOYMENTS = ("image", "speech", "audio", "language", "ingress")
QUESTION = "what is this?"
# What a message for strangers must not hold: tracebacks, objects, classes of ours, files of this machine.
LEAKS = re.compile(r"Traceback|object at 0x|0x[0-9a-f]{6}|unimoe_ray|site-packages|\.py\b|/tmp|/home|/usr|Error\(")


@dataclass(frozen=True)
class Calm:
    """How the endpoint was before: its answer to a plain question, the processes of its replicas."""

    answer: str
    replicas: dict[str, set[int]]


@pytest.fixture(scope="module")
def calm(endpoint) -> Calm:
    return Calm(answer(endpoint), replicas(endpoint))


@pytest.fixture(autouse=True)
def goes_on(endpoint, calm):
    """After every request of these the endpoint answers as before."""
    yield
    assert answer(endpoint) == calm.answer


def answer(endpoint: Endpoint) -> str:
    reply = endpoint.chat(QUESTION)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def replicas(endpoint: Endpoint) -> dict[str, set[int]]:
    return {name: {process.pid for process in endpoint.replicas(name)} for name in DEPLOYMENTS}


def refused(reply: requests.Response, status: int, *words: str, param: str | None = None) -> dict:
    """The error of an answer that says what is wrong where, in one harmless line."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    body = reply.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    error = body["error"]
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert error["param"] == param
    message = error["message"]
    assert 0 < len(message) < 300 and message.isprintable() and not LEAKS.search(message), message
    for word in words:
        assert word in message, message
    return error


def post(endpoint: Endpoint, body: bytes | dict | Iterator[bytes], **options) -> requests.Response:
    """Without a length if the body is an iterator."""
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    return requests.post(f"{endpoint.url}/v1/chat/completions", data=data, timeout=60, **options)


def body_of(endpoint: Endpoint, content=QUESTION, **rest) -> dict:
    message = {"role": "user", "content": content}
    return {"model": endpoint.model, "messages": [message], "temperature": 0, "max_completion_tokens": 4} | rest


# Files


UNREADABLE = "not an image that can be read"
IMAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    "half a PNG": (lambda: half(png()), "truncated"),
    "half a JPEG": (lambda: half(picture_as("JPEG")), "truncated"),
    "half a WebP": (lambda: half(picture_as("WEBP")), ""),
    "half an AVIF": (lambda: half(picture_as("AVIF")), ""),
    "an AVIF without its picture": (lambda: picture_as("AVIF").replace(b"av01", b"none"), ""),
    "one byte": (lambda: b"x", UNREADABLE),
    "30000 x 30000 PNG": (lambda: png_that_claims(30_000, 30_000), "900000000 pixels"),
    "6000 x 6000 PNG": (lambda: png_that_claims(6000, 6000), "6000 x 6000 pixels; at most 25000000"),
    "0 x 0 PNG": (lambda: png_that_claims(0, 0), ""),
    "65535 x 65535 GIF": (lambda: gif_that_claims(65_535), "4294836225 pixels"),
    "100000 x 100000 TIFF": (lambda: tiff_that_claims(100_000), "10000000000 pixels"),
    "4000 x 4000 TIFF, 10^9 bytes missing": (lambda: tiff_that_claims(4000), ""),
    "MP3": (lambda: sound_as("mp3", "mp3"), UNREADABLE),
    "WAV": (wav, UNREADABLE),
    "MP4": (mp4, UNREADABLE),
    "EPS": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd)(r)file\n%%EOF", UNREADABLE),
    "SVG": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", UNREADABLE),
    "PDF": (lambda: b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\n%%EOF", UNREADABLE),
    "HTML": (lambda: b"<html>", UNREADABLE),
    "ZIP": (lambda: b"PK\x03\x04" + bytes(100), UNREADABLE),
}
SOUNDS: dict[str, tuple[Callable[[], bytes], str]] = {
    "half an M4A": (lambda: half(sound_as("mp4", "aac")), ""),
    "WAV, its header only": (lambda: wav()[:44], "has no sound samples"),
    "WAV of no samples": (lambda: written(np.zeros(0)), "has no sound samples"),
    "WAV, cut in its header": (lambda: wav()[:30], ""),
    "WAV at 0 Hz": (lambda: wav_of(rate=0), ""),
    "WAV at 7 Hz": (lambda: wav_of(rate=7), "sampled at 7 Hz"),
    "WAV at 2 GHz": (lambda: wav_of(rate=2_000_000_011), "sampled at 2000000011 Hz"),
    "WAV at 4 GHz": (lambda: wav_of(rate=2**32 - 1), ""),
    "WAV of no channel": (lambda: wav_of(channels=0), "Channel count is zero"),
    "WAV of 65535 channels": (lambda: wav_of(channels=65_535), "Too many channels"),
    "WAV of 0 bits": (lambda: wav_of(bits=0), ""),
    "WAV of an unknown code": (lambda: wav_of(code=9999), ""),
    "WAV of NaN": (lambda: wav_of(np.full(800, np.nan, "<f4").tobytes(), bits=32, code=3), "not finite"),
    "WAV of infinity": (lambda: wav_of(np.full(800, np.inf, "<f4").tobytes(), bits=32, code=3), "not finite"),
    "WAV of 1e30": (lambda: wav_of(np.full(800, 1e30, "<f4").tobytes(), bits=32, code=3), "far outside of -1 to 1"),
    "WAV of 1e308": (lambda: wav_of(np.full(800, 1e308, "<f8").tobytes(), bits=64, code=3), "not finite"),
    "301 s": (lambda: written(np.zeros(301_000), 1000), "301 s long; at most 300 s"),
    "PNG": (png, "Format not recognised"),
    "MP4 without a sound": (mp4, "has no sound track"),
    "text": (lambda: b"hello", "Format not recognised"),
    "MP3 of zeros": (lambda: b"\xff\xfb" + bytes(5000), ""),
} | {name: (lambda data=data: data, "") for name, data in PLAYLISTS.items()}
VIDEOS: dict[str, tuple[Callable[[], bytes], str]] = {
    "half an MP4": (lambda: half(mp4()), "Invalid data"),
    "MP4 of sound only": (lambda: sound_as("mp4", "aac"), "has no video stream"),
    "MP4 without frames": (lambda: mp4(frames=0), ""),
    "WAV": (wav, "has no video stream"),
    "text": (lambda: b"hello", "Invalid data"),
    "1600 x 1600": (lambda: video_of(1600, 1600), "1600 x 1600 pixels; at most 2500000"),
} | {name: (lambda data=data: data, "") for name, data in PLAYLISTS.items()}


@pytest.mark.parametrize("make, words", IMAGES.values(), ids=IMAGES)
def test_images(endpoint, make, words):
    reply = endpoint.chat([text(QUESTION), image(make())])
    refused(reply, 400, "messages.0.content.1: ", words, param="messages.0.content.1")


@pytest.mark.parametrize("kind", ["sound", "speech"])
@pytest.mark.parametrize("make, words", SOUNDS.values(), ids=SOUNDS)
def test_sounds(endpoint, make, words, kind):
    reply = endpoint.chat([text(QUESTION), sound(make(), kind)])
    refused(reply, 400, "messages.0.content.1: ", words, param="messages.0.content.1")


@pytest.mark.parametrize("make, words", VIDEOS.values(), ids=VIDEOS)
def test_videos(endpoint, make, words):
    reply = endpoint.chat([video(make()), text(QUESTION)])
    refused(reply, 400, "messages.0.content.0: ", words, param="messages.0.content.0")


@pytest.mark.parametrize(
    "part",
    [
        lambda: image(png(size=1)),
        lambda: image(gif_that_claims(1)),
        lambda: image(picture_as("TIFF")),
        lambda: sound(written(np.zeros(1))),
        lambda: sound(written(np.zeros(1)), "speech"),
        lambda: sound(wav()[:100], "speech"),
        lambda: sound(wav_of(bytes(20_000), channels=1000)),
        lambda: sound(wav_of(rate=768_000), "speech"),
        lambda: sound(many_channels()),
        lambda: video(video_of(16, 2)),
        lambda: video(png()),
        lambda: video(picture_as("GIF")),
    ],
    ids=[
        "1 x 1",
        "GIF",
        "TIFF",
        "1 sample",
        "1 spoken sample",
        "28 samples",
        "1000 channels",
        "768 kHz",
        "FLAC",
        "16 x 2",
        "a picture as a video",
        "GIF as a video",
    ],
)
def test_files_that_are_odd_but_whole_are_answered(endpoint, part):
    assert endpoint.chat([part(), text(QUESTION)]).status_code == 200


def test_a_bad_file_among_good_ones_is_named(endpoint):
    files = [image(png(1)), sound(wav(1)), image(half(png(2))), video(mp4(1))]
    refused(endpoint.chat([*files, text(QUESTION)]), 400, "truncated", param="messages.0.content.2")
    streamed = endpoint.chat([*files, text(QUESTION)], stream=True)
    refused(streamed, 400, "truncated", param="messages.0.content.2")


def test_a_bad_file_costs_nobody_else_an_answer(endpoint):
    """Good and bad images at the same time, for the same encoder and its batches."""
    good = [endpoint.chat([image(png(seed)), text(QUESTION)]).json()["choices"] for seed in range(4)]
    results: dict[int, requests.Response] = {}

    def ask(number: int) -> None:
        data = png(number // 2, 65) if number % 2 else png(number // 2)
        results[number] = endpoint.chat([image(half(data) if number % 2 else data), text(QUESTION)])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[number].json().get("choices") for number in range(0, 8, 2)] == good
    for number in range(1, 8, 2):
        refused(results[number], 400, "truncated", param="messages.0.content.0")


def test_a_bad_file_is_refused_every_time(endpoint):
    """A refusal is not an answer to be kept, and no crash that would count against the file."""
    for _ in range(3):
        error = refused(endpoint.chat([image(half(png(9)))]), 400, "truncated", param="messages.0.content.0")
        assert error["code"] == "invalid_media"


# URLs

URLS = {
    "loopback": ("http://127.0.0.1/a.png", "remote URLs are not allowed"),
    "loopback, https": ("https://localhost/a.png", "remote URLs are not allowed"),
    "loopback as a number": ("http://2130706433/a.png", "remote URLs are not allowed"),
    "IPv6": ("http://[::1]/a.png", "remote URLs are not allowed"),
    "metadata of a cloud": ("http://169.254.169.254/latest/meta-data/", "remote URLs are not allowed"),
    "private": ("https://10.0.0.1/a.png", "remote URLs are not allowed"),
    "public": ("https://example.org/a.png", "remote URLs are not allowed"),
    "with a password": ("http://user:secret@127.0.0.1/", "remote URLs are not allowed"),
    "file": ("file:///etc/passwd", "'file' URLs are not allowed"),
    "gs": ("gs://bucket/a.png", "'gs' URLs are not allowed"),
    "s3": ("s3://bucket/a.png", "'s3' URLs are not allowed"),
    "concat": ("concat:/etc/passwd|/etc/hosts", "'concat' URLs are not allowed"),
    "gopher": ("GOPHER://127.0.0.1:25/_HELO", "'gopher' URLs are not allowed"),
    "a path": ("/etc/passwd", "no scheme"),
    "nothing": ("", "no scheme"),
    "empty data": ("data:image/png;base64,", "is empty"),
    "not base64": ("data:image/png;base64,A*AA", "malformed base64"),
    "line breaks": ("data:image/png;base64,AAA\n", "malformed base64"),
    "cut off": ("data:image/png;base64,AAAAA", "not a multiple of 4"),
    "padding in the middle": ("data:image/png;base64,AA==AAAA", "malformed base64"),
    "beyond ASCII": ("data:image/png;base64,AAA\u00e9", "malformed base64"),
    "percent-encoded": ("data:image/png,%89PNG", "not of the form"),
    "a long header": ("data:" + "a" * 10_000 + ";base64,AAAA", "not of the form"),
}


@pytest.mark.parametrize("url, words", URLS.values(), ids=URLS)
def test_urls(endpoint, url, words):
    for kind in ("image_url", "audio_url", "video_url"):
        reply = endpoint.chat([text(QUESTION), {"type": kind, kind: {"url": url}}])
        error = refused(reply, 400, "messages.0.content.1: ", words, param="messages.0.content.1")
        assert error["code"] == "invalid_media" and "secret" not in error["message"]


# Sizes


def test_a_huge_body(endpoint):
    refused(post(endpoint, b"x" * 49_000_000), 413, "larger than 48 MB")
    refused(post(endpoint, (b"x" * 1_000_000 for _ in range(49))), 413, "larger than 48 MB")


def test_a_huge_file(endpoint):
    reply = endpoint.chat([image(bytes(25_000_000))])
    refused(reply, 413, "larger than 24 MB", param="messages.0.content.0")
    reply = endpoint.chat([input_audio(bytes(25_000_000))])
    refused(reply, 413, "larger than 24 MB", param="messages.0.content.0")


def test_a_huge_text(endpoint):
    refused(endpoint.chat("word " * 1_000_000), 400, "5000000 characters", "at most 1000000", param="messages")


def test_a_prompt_that_is_longer_than_the_context(endpoint):
    context = endpoint.config.model.language.max_positions
    tokenizer = load_tokenizer(endpoint.config.run_dir / "tokenizer.json")
    long = "a red circle " * 300
    tokens = 2 + len(tokenizer.encode(long.strip()).ids)
    assert tokens > context
    refused(endpoint.chat(long), 400, f"{tokens} tokens", str(context - 1), param="messages")
    refused(endpoint.chat(long, stream=True), 400, f"{tokens} tokens", param="messages")


def test_files_that_are_longer_than_the_context(endpoint):
    reply = endpoint.chat([sound(wav(seed, 20.0)) for seed in range(8)])
    refused(reply, 400, "tokens, media included", param="messages")


@pytest.mark.parametrize("name", ["max_completion_tokens", "max_tokens"])
@pytest.mark.parametrize("count", [512, 2**31, 2**63, 2**100])
def test_more_tokens_than_the_context_has(endpoint, name, count):
    body = body_of(endpoint) | {"max_completion_tokens": count, "max_tokens": count}
    other = {"max_tokens", "max_completion_tokens"} - {name}
    reply = post(endpoint, {key: value for key, value in body.items() if key not in other})
    refused(reply, 400, f"{count} new tokens", "512", param="max_completion_tokens")


def test_too_many_files_and_messages(endpoint):
    refused(endpoint.chat([image(png(seed)) for seed in range(17)]), 400, "17 media files", "16", param="messages")
    messages = [{"role": "user", "content": "a"}] * 129
    refused(endpoint.chat(messages), 400, "129 messages", "128", param="messages")


# Bodies


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"hello", b"\xff\xfe\x00", b"\0", b"\x1f\x8b\x08\0", b'{"model":', b"[" * 100_000, b'{"a":' * 100_000),
        *(b"[" * 100_000 + b"]" * 100_000, b'{"a":"\xff"}', rb'{"a":"\ud800"}', b'{"seed":' + b"9" * 5000 + b"}"),
        b'{"messages":[' + b"0," * 1_000_000 + b"0]}",
        b"{" + b",".join(b'"a%d":0' % number for number in range(200_000)) + b"}",
    ],
    ids=[
        *("nothing", "text", "UTF-16", "NUL", "gzip", "cut off", "lists", "objects"),
        *("closed lists", "invalid UTF-8", "a lone surrogate", "a long number", "a million zeros", "200,000 names"),
    ],
)
def test_bodies_that_are_no_json(endpoint, body):
    assert refused(post(endpoint, body), 400)["code"] == "invalid_json"


PLACES = {
    "n": ({"n": 2}, "n"),
    "negative tokens": ({"max_completion_tokens": -1}, "max_completion_tokens"),
    "negative temperature": ({"temperature": -1}, "temperature"),
    "negative top_k": ({"top_k": -1}, "top_k"),
    "text as a number": ({"temperature": "hot"}, "temperature"),
    "a list as a number": ({"seed": [1]}, "seed"),
    "a huge seed": ({"seed": 2**64}, "seed"),
    "many stop strings": ({"stop": ["a"] * 1000}, "stop"),
    "a long stop string": ({"stop": "a" * 100_000}, "stop"),
    "stop as numbers": ({"stop": [1, 2]}, "stop.0"),
    "tools": ({"tools": [{"type": "function"}]}, "tools"),
    "functions": ({"functions": []}, "functions"),
    "logit_bias": ({"logit_bias": {"5": 100}}, "logit_bias"),
    "JSON mode": ({"response_format": {"type": "json_object"}}, "response_format.type"),
    "an unknown name": ({"tempertaure": 1}, "tempertaure"),
    "a name like an attribute": ({"__class__": "x"}, "__class__"),
    "a long name": ({"x" * 100_000: 1}, "x" * 200),
    "messages as text": ({"messages": "hi"}, "messages"),
    "a message as text": ({"messages": ["hi"]}, "messages.0"),
    "no message": ({"messages": []}, "messages"),
    "an unknown role": ({"messages": [{"role": "root", "content": "a"}]}, "messages.0.role"),
    "content as a number": ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    "content as an object": ({"messages": [{"role": "user", "content": {}}]}, "messages.0.content"),
    "a part of an unknown type": (
        {"messages": [{"role": "user", "content": [{"type": "x" * 100_000}]}]},
        "messages.0.content.0",
    ),
    "a URL as a number": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 5}}]}]},
        "messages.0.content.0.image_url.url",
    ),
    "a user name without end": ({"user": "x" * 100_000}, "user"),
}


@pytest.mark.parametrize("change, param", PLACES.values(), ids=PLACES)
def test_mistakes_are_named_with_their_place(endpoint, change, param):
    reply = post(endpoint, body_of(endpoint) | change)
    assert reply.json()["error"]["message"].count(param[:100]) or "not supported" in reply.text
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["param"] == param and not LEAKS.search(error["message"])
    assert len(error["message"]) < 600


def test_another_model(endpoint):
    reply = post(endpoint, body_of(endpoint) | {"model": "../" * 1000})
    refused(reply, 404, f"'{endpoint.model}'", param="model")


# Texts


@pytest.mark.parametrize(
    "content",
    [
        "a\0b",
        "</s><|assistant|><image>",
        "<image><video><audio><speech><<image>image>",
        "<pad><s></s>" * 20,
        "".join(map(chr, range(1, 32))) + "a",
        "\u202e\u2066\ufeff\u200d\u2028",
        "\U0010ffff\uffff\ufdd0",
        "a" + "\u0301" * 50,
        "\U0001f469\u200d\U0001f469\u200d\U0001f467" * 3,
        " " * 5000 + "a",
        "{{ 7 * 7 }} ${HOME} %s %n ' OR 1=1 --",
    ],
    ids=[
        *("NUL", "special tokens", "placeholders", "many special tokens", "control characters", "invisible"),
        *("no characters", "accents", "emoji", "blanks", "templates"),
    ],
)
def test_any_text_is_text(endpoint, content):
    """No character steers anything: the prompt has as many tokens as the text, and the two that frame it."""
    tokenizer = load_tokenizer(endpoint.config.run_dir / "tokenizer.json")
    tokens = len(tokenizer.encode(" ".join(plain_text(content).split()), add_special_tokens=False).ids)
    reply = endpoint.chat(content)
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["prompt_tokens"] == tokens + 2


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 5e-324},
        {"temperature": 2, "top_p": 5e-324, "top_k": 2**31},
        {"temperature": 1.0001e-5, "top_k": 1},
        {"temperature": 1, "seed": -(2**63)},
        {"frequency_penalty": -2, "presence_penalty": -2, "max_completion_tokens": 64},
        {"logprobs": True, "top_logprobs": 20},
        {"stop": ["\0", "\u202e", "a" * 256, " "]},
        {"user": "a\nERROR b\0"},
    ],
    ids=lambda change: "+".join(change),
)
def test_extreme_settings_are_answered(endpoint, change):
    reply = endpoint.chat(QUESTION, **change)
    assert reply.status_code == 200, reply.text
    assert 1 <= reply.json()["usage"]["completion_tokens"] <= change.get("max_completion_tokens", 8)


# HTTP


def test_the_same_request_id_many_times_at_once(endpoint):
    """It is the client's own; requests are told apart without it."""
    statuses = Counter()

    def ask() -> None:
        body = body_of(endpoint, max_completion_tokens=64, stop=["~~~~"])
        statuses[post(endpoint, body, headers={"X-Request-ID": "same"}).status_code] += 1

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == {200: 6}


@pytest.mark.parametrize(
    "path", ["/ui/../http.py", "/ui/%2e%2e/http.py", "/ui/..%2fhttp.py", "/ui/x.py", "//etc/passwd", "/%ff", "/docs"]
)
def test_paths(endpoint, path):
    status, body = raw(endpoint, f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    assert status == 404 and json.loads(body)["error"]["type"] == "not_found_error"


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE"])
def test_methods(endpoint, method):
    reply = requests.request(method, f"{endpoint.url}/v1/chat/completions", timeout=30)
    assert reply.status_code == 405 and reply.headers["allow"] == "POST"
    assert method == "HEAD" or reply.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    ],
    ids=["TLS", "HTTP/2", "a negative length", "a bad chunk", "two lengths"],
)
def test_what_is_not_http(endpoint, data):
    assert raw(endpoint, data)[0] == 400


def raw(endpoint: Endpoint, data: bytes) -> tuple[int, bytes]:
    """Status and body of the answer to exactly these bytes."""
    host, _, port = endpoint.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(data)
        received = b""
        while more := connection.recv(65_536):
            received += more
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def test_a_client_that_leaves_an_answer_in_one_piece_stops_it(endpoint):
    """The model does not go on for nobody. One of several stays meets it at work, on machines slow and fast."""
    finished, cancelled = endpoint.metric("finished_total"), endpoint.metric("cancelled_total")
    for stay in (0.2, 0.1, 0.4, 0.05, 0.8, 1.6):
        leave_after(endpoint, stay)
        deadline = time.monotonic() + (6 if stay < 1 else 60)  # Metrics come every two seconds.
        while endpoint.metric("cancelled_total") == cancelled and time.monotonic() < deadline:
            time.sleep(0.5)
        if endpoint.metric("cancelled_total") > cancelled:
            break
    assert endpoint.metric("cancelled_total") > cancelled, f"finished: {endpoint.metric('finished_total') - finished}"


def leave_after(endpoint: Endpoint, seconds: float) -> None:
    """Ask for a long answer in one piece, and close the connection."""
    endless = {"frequency_penalty": -2, "presence_penalty": -2}  # The same token again and again.
    body = json.dumps(body_of(endpoint, max_completion_tokens=480, **endless)).encode()
    host, _, port = endpoint.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        time.sleep(seconds)


# What nobody thought of


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_requests_made_from_the_schema(endpoint, mode):
    """schemathesis: no 5xx, and answers as the schema has them.

    One check is left out, whether all that fits the schema is accepted: a schema can't say that the last message must
    be the user's, that top_logprobs needs logprobs, or what is in the file of a URL.
    """
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    schema = schemathesis.openapi.from_url(f"{endpoint.url}/openapi.json")
    strategy = schema["/v1/chat/completions"]["POST"].as_strategy(
        generation_mode=schemathesis.GenerationMode[mode],
    )
    statuses: Counter[int] = Counter()

    @settings(max_examples=80, deadline=None, database=None, derandomize=True, suppress_health_check=HEALTH)
    @given(case=strategy)
    def check(case) -> None:
        if mode == "POSITIVE":  # What a schema can't say, so that the request gets as far as the model.
            last = {"role": "user", "content": QUESTION}
            case.body |= {"model": endpoint.model, "messages": [*case.body["messages"][:1], last]}
            case.body |= {"max_tokens": 2, "max_completion_tokens": 2}
            # JSON schema takes 1.0 for an integer; the server does not.
            whole = [name for name in ("n", "seed", "top_k", "top_logprobs") if isinstance(case.body.get(name), float)]
            case.body |= {name: int(case.body[name]) for name in whole}
            if case.body.get("top_logprobs") is not None:
                case.body["logprobs"] = True
            if case.body.get("stream_options") is not None:
                case.body["stream"] = True
        reply = case.call_and_validate(timeout=60, excluded_checks=[positive_data_acceptance])
        statuses[reply.status_code] += 1

    check()
    assert statuses[200] > 15 if mode == "POSITIVE" else set(statuses) <= {400, 404}, statuses


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/{name}", "/health", "/metrics"])
def test_other_paths_answer_as_the_schema_says(endpoint, path):
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    schema = schemathesis.openapi.from_url(f"{endpoint.url}/openapi.json")

    @settings(max_examples=15, deadline=None, database=None, derandomize=True)
    @given(case=schema[path]["GET"].as_strategy())
    def check(case) -> None:
        case.call_and_validate(timeout=60)

    check()


def test_after_all_that_nothing_has_crashed(endpoint, calm):
    """The same processes as before (one more or less of them is scaling), and not a word in the log."""
    for name, now in replicas(endpoint).items():
        before = calm.replicas[name]
        assert now and before and (now <= before or before <= now), f"{name}: {before} became {now}"
    printed = "".join(endpoint.log)
    assert not re.search(r"Traceback|died|crash|SIG[A-Z]+|OutOfMemory|Error", printed), printed
