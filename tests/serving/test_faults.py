"""Replicas killed with signal 9 under light load: no request hangs, no answer is wrong, only the stated errors."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import requests

from tests.serving.conftest import Endpoint, serve_run
from tests.serving.media import image, png, sound, text, wav

STATED = {400, 429, 503, 504}
LONG = {"max_completion_tokens": 300, "stop": ["~~~~"]}


@pytest.fixture(scope="module")
def fragile(servable_run) -> Iterator[Endpoint]:
    """Its own endpoint; the speech encoder goes when nobody needs it."""
    goes = ["min_replicas=0", "initial_replicas=0", "downscale_delay_s=1", "look_back_period_s=2", "upscale_delay_s=0"]
    overrides = [*(f"serving.speech.{setting}" for setting in goes), "serving.limits.request_seconds=120"]
    overrides.append("serving.engine.messages_per_s=1000")  # To be killed between them.
    yield from serve_run(servable_run.config, *overrides)


def wait_for(condition: Callable[[], object], seconds: float) -> float:
    """Seconds until it holds; fails when it does not."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"not within {seconds} s"
        time.sleep(0.2)
    return time.monotonic() - started


def kill(endpoint: Endpoint, deployment: str) -> int:
    (replica, *_) = endpoint.replicas(deployment)
    os.kill(replica.pid, signal.SIGKILL)
    return replica.pid


def replaced(endpoint: Endpoint, deployment: str, pid: int) -> bool:
    return any(replica.pid != pid for replica in endpoint.replicas(deployment))


def answer(endpoint: Endpoint, content, **rest) -> tuple[int, str]:
    reply = endpoint.chat(content, **rest)
    if reply.status_code == 200:
        return 200, reply.json()["choices"][0]["message"]["content"]
    return reply.status_code, reply.json()["error"]["message"]


def stream(endpoint: Endpoint, content, begun: threading.Event, **rest) -> tuple[str, str | None, bool]:
    """(text, error message or None, whether [DONE] came) of a streamed answer; ``begun`` is set by its text."""
    reply = endpoint.chat(content, stream=True, **rest)
    if reply.status_code != 200:
        assert reply.status_code in STATED
        return "", reply.json()["error"]["message"], False
    told, error, done = "", None, False
    for line in reply.iter_lines():
        if not line:
            continue
        payload = line.decode().removeprefix("data: ")
        if payload == "[DONE]":
            done = True
        elif "error" in (event := json.loads(payload)):
            error = event["error"]["message"]
        else:
            told += "".join(choice["delta"].get("content", "") for choice in event["choices"])
            if told:
                begun.set()
    return told, error, done


def under_load(jobs: list[Callable], then: Callable, when: Callable[[], object]) -> list:
    """Results of all jobs, in order, begun together; ``then`` is done when ``when`` returns."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = [pool.submit(job) for job in jobs]
        when()
        then()
        return [future.result(timeout=150) for future in futures]


QUESTIONS = [f"what is this? number {number}" for number in range(6)]
PICTURE = [image(png(1, 900)), text("what is this?")]


def asked(endpoint: Endpoint) -> list[dict]:
    """Eight requests: greedy, seeded, with logprobs, media, penalties, and one with a stop string far into its answer.
    Random weights speak in bytes, so all have characters of several bytes and halves of such."""
    stopped = {"content": QUESTIONS[0], "max_completion_tokens": 300, "temperature": 1.0, "seed": 5}
    whole = answer(endpoint, **stopped)[1]
    middle = whole[len(whole) // 2 :]
    stop = next(middle[i : i + 4] for i in range(len(middle)) if "\ufffd" not in middle[i : i + 4])
    seeded = [{"temperature": 1.2, "seed": seed} | LONG for seed in range(3)]
    return [
        {"content": QUESTIONS[1], **LONG},
        {"content": QUESTIONS[2], "expert_load": True, **LONG},
        {"content": PICTURE, **LONG},
        {"content": QUESTIONS[3], **seeded[0]},
        {"content": QUESTIONS[3], **seeded[1]},
        {"content": PICTURE, **seeded[2]},
        {"content": QUESTIONS[4], **LONG, "frequency_penalty": 0.5, "presence_penalty": 0.5},
        stopped | {"stop": [stop]},
    ]


@dataclass
class Told:
    """A stream to its end. at: when each piece of text came; last: the event with usage and the like."""

    text: str = ""
    pieces: list[str] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    last: dict = field(default_factory=dict)
    error: str | None = None
    done: bool = False

    def same(self) -> tuple:
        """What no death of a replica may change."""
        return self.text, self.finish_reason, self.last.get("usage"), self.last.get("expert_load"), self.error

    @property
    def pause(self) -> float:
        return max(later - earlier for earlier, later in pairwise(self.at))


def listen(endpoint: Endpoint, request: dict, far: threading.Semaphore | None = None) -> Told:
    """Ask for a stream and read it; ``far`` is released once it has come some way."""
    told = Told()
    reply = endpoint.chat(**request, stream=True, stream_options={"include_usage": True})
    if reply.status_code != 200:
        assert reply.status_code in STATED, reply.text
        told.error = reply.json()["error"]["message"]
        return told
    for payload in (line.decode().removeprefix("data: ") for line in reply.iter_lines() if line):
        if payload == "[DONE]":
            told.done = True
            continue
        event = json.loads(payload)
        if "error" in event:
            told.error = event["error"]["message"]
        elif not event["choices"]:
            told.last = event
        else:
            (choice,) = event["choices"]
            told.finish_reason = choice["finish_reason"]
            if piece := choice["delta"].get("content"):
                told.text += piece
                told.pieces.append(piece)
                told.at.append(time.monotonic())
                if far is not None and len(told.pieces) == 5:
                    far.release()
    assert told.done == (told.error is None)
    return told


def test_streams_go_on_when_the_language_model_dies(fragile):
    """To the same text, usage, reasons to end and expert counts; so do answers in one piece. Clients see a pause."""
    requests_ = asked(fragile)
    right = [listen(fragile, request) for request in requests_]
    assert len({told.text for told in right}) == 8 and all(told.done for told in right)
    assert right[-1].finish_reason == "stop" and not any(told.text.isascii() for told in right)
    whole = [answer(fragile, question, **LONG) for question in QUESTIONS[:2]]

    def killed() -> list[Told]:
        """The streams that a kill met halfway."""
        (replica,) = fragile.replicas("language")
        far, when = threading.Semaphore(0), []
        jobs: list[Callable] = [lambda r=r: listen(fragile, r, far) for r in requests_]
        jobs += [lambda q=q: answer(fragile, q, **LONG) for q in QUESTIONS[:2]]

        def strike() -> None:
            os.kill(replica.pid, signal.SIGKILL)
            when.append(time.monotonic())

        results = under_load(jobs, strike, lambda: [far.acquire(timeout=60) for _ in range(4)])
        for told, expected in zip(results, right, strict=False):
            assert told.same() == expected.same()
        assert results[8:] == whole
        wait_for(lambda: replaced(fragile, "language", replica.pid) and not replica.is_running(), 120)
        return [told for told in results[:8] if told.at[0] < when[0] < told.at[-1]]

    for _ in range(3):  # The model may be faster than this process.
        broken = killed()
        if len(broken) >= 4:
            break
    assert len(broken) >= 4, "the kills came too late to break the streams"
    print(f"{len(broken)} streams went on after {sorted(round(told.pause, 1) for told in broken)} s")


@pytest.mark.parametrize("deployment", ["image", pytest.param("audio", marks=pytest.mark.slow)])
def test_an_encoder_dies(fragile, deployment):
    make = (lambda seed: image(png(seed, 900))) if deployment == "image" else (lambda seed: sound(wav(seed, 20.0)))
    contents = [[make(seed), text("what is this?")] for seed in range(8)]
    pids: list[int] = []
    jobs = [lambda c=c: answer(fragile, c) for c in contents]
    results = under_load(jobs, lambda: pids.append(kill(fragile, deployment)), lambda: time.sleep(0.15))
    assert {status for status, _ in results} == {200}, results
    wait_for(lambda: replaced(fragile, deployment, pids[0]), 120)
    fresh = [[make(seed), text("what is this?")] for seed in range(8)]
    assert [answer(fragile, content) for content in fresh] == results


def test_the_ingress_dies(fragile):
    """Streams go on where they were."""
    right = {question: answer(fragile, question, **LONG) for question in QUESTIONS}
    jobs = [lambda q=q: answer(fragile, q, **LONG) for q in QUESTIONS]
    begun = threading.Event()
    jobs += [lambda q=q: stream(fragile, q, begun, **LONG) for q in QUESTIONS]
    results = under_load(jobs, lambda: kill(fragile, "ingress"), lambda: begun.wait(60))
    for question, (status, told) in zip(QUESTIONS, results[: len(QUESTIONS)], strict=True):
        assert (status, told) == right[question] or status in STATED
    for question, (told, error, done) in zip(QUESTIONS, results[len(QUESTIONS) :], strict=True):
        assert (told, error, done) == (right[question][1], None, True)
    wait_for(lambda: requests.get(f"{fragile.url}/health", timeout=120).status_code == 200, 120)
    assert answer(fragile, QUESTIONS[0], **LONG) == right[QUESTIONS[0]]


def test_a_client_that_leaves_frees_its_slot_within_a_second(fragile):
    """The language model's log says when. Most of five do: one may meet a machine that stands still, or be too late."""
    (replica,) = fragile.replicas("language")
    (log,) = [Path(file.path) for file in replica.open_files() if "/logs/serve/replica_" in file.path]

    def ends(name: str) -> list[str]:
        mine = [line for line in log.read_text().splitlines() if name in line]
        return [line for line in mine if "left after" in line or "generated" in line]

    seconds = []
    for name in (f"leaves-{number}" for number in range(5)):
        options = {"stream": True, "max_completion_tokens": 480, "temperature": 1.0, "seed": 1}
        reply = fragile.chat("tell me", {"X-Request-ID": name}, **options)
        lines = reply.iter_lines()
        for _ in range(3):
            next(lines)
        gone = datetime.now()
        reply.close()
        wait_for(lambda name=name: ends(name), 60)
        (line,) = ends(name)
        written = datetime.strptime(re.search(r"[\d-]{10} [\d:]{8},\d{3}", line)[0], "%Y-%m-%d %H:%M:%S,%f")
        if "left after" in line:
            seconds.append((written - gone).total_seconds())
    assert len(seconds) >= 3 and statistics.median(seconds) < 1, seconds


@pytest.mark.slow
def test_an_encoder_comes_and_goes_without_a_failed_request(fragile):
    assert not fragile.replicas("speech")
    contents = [[sound(wav(100 + seed), "speech"), text("what is this?")] for seed in range(4)]
    jobs = [lambda c=c: answer(fragile, c) for c in contents]
    results = under_load(jobs, lambda: wait_for(lambda: fragile.replicas("speech"), 60), lambda: None)
    assert {status for status, _ in results} == {200}
    wait_for(lambda: not fragile.replicas("speech"), 60)
    # What was encoded before is there without it; new sounds bring it back.
    assert [answer(fragile, content) for content in contents] == results
    assert not fragile.replicas("speech")
    assert answer(fragile, [sound(wav(200), "speech"), text("and this?")])[0] == 200


def test_nothing_is_left_running_and_nothing_was_printed(fragile):
    """After all that, the log holds the addresses and no traceback."""
    printed = "".join(fragile.log)
    assert "Traceback" not in printed and "page" in printed
    assert psutil.Process(fragile.process.pid).is_running()
    assert Path(fragile.config.run_dir).is_dir()
