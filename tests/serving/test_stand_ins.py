"""What needs an encoder that behaves as told, in Serve's default and in its throughput mode.

The throughput mode sends what is passed by value over gRPC, whose messages end at 4 MiB: an image of the 7B model is
4.7 MB, a sound of 20 windows 8.2 MB.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from serve.launch import environment
from tests.ports import free_port
from tests.serving.conftest import ROOT, replicas_below
from tests.serving.media import image, sound, text
from tests.serving.stand_ins import DEADLY, HELD, STOP_ENGINE
from tests.serving.test_faults import wait_for
from tests.tiny import TinyRun, make_servable_run

IMAGE_TOKENS, SOUND_TOKENS = 576, 1000
QUESTION = text("what is this?")
the_other_slow = pytest.mark.parametrize(
    "app", ["default", pytest.param("throughput", marks=pytest.mark.slow)], indirect=True
)


@dataclass
class StandIns:
    url: str
    model: str
    process: subprocess.Popen
    printed: list[str]

    def post(self, *parts: dict, patience: float = 120, **rest) -> requests.Response:
        body = {"model": self.model, "messages": [{"role": "user", "content": list(parts)}], "temperature": 0}
        body |= {"max_completion_tokens": 3} | rest
        return requests.post(f"{self.url}/v1/chat/completions", json=body, timeout=patience)

    def ask(self, *parts: dict, **rest) -> dict:
        reply = self.post(*parts, **rest)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def encoders(self) -> set[int]:
        return {replica.pid for replica in replicas_below(self.process, self.model, "encoder")}

    def wait_until_ready(self) -> None:
        for line in self.process.stdout:
            self.printed.append(line)
            if line == "ready\n":
                return
        pytest.fail("".join(self.printed))


@pytest.fixture(scope="module")
def wide_run(tmp_path_factory) -> TinyRun:
    """One layer of the 7B model's width; everything else as small as it goes."""
    language = {"hidden_size": 4096, "intermediate_size": 16, "num_layers": 1, "num_heads": 32, "num_kv_heads": 1}
    return make_servable_run(
        tmp_path_factory.mktemp("wide"),
        model={"language": language | {"max_positions": 4096}},
        serving={"engine": {"kv_tokens": 16384}, "image": {"max_ongoing_requests": 8, "max_queued_requests": 8}},
    )


@pytest.fixture(scope="module")
def app(request, wide_run) -> Iterator[StandIns]:
    settings = wide_run.config.model_copy(deep=True)
    settings.serving.throughput_mode = request.param == "throughput"
    port = free_port()
    haproxy_ports = {f"RAY_SERVE_HAPROXY_{name}_PORT": str(free_port()) for name in ("METRICS", "STATS")}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.serving.stand_ins", str(wide_run.config.run_dir), str(port)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment(settings) | haproxy_ports,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    running = StandIns(f"http://127.0.0.1:{port}", wide_run.config.name, process, [])
    try:
        running.wait_until_ready()
        yield running
    finally:
        process.stdin.close()
        process.wait(60)


def held(until: Path, number: int = 0) -> dict:
    """An image that the encoder works on until there is that file."""
    return image(HELD + bytes(until) + bytes([0, number]))


@the_other_slow
def test_embeddings_of_the_real_size(app):
    plain = app.ask(QUESTION)["usage"]["prompt_tokens"]
    assert app.ask(image(b"\0\0\0\1"), QUESTION)["usage"]["prompt_tokens"] == plain + IMAGE_TOKENS
    assert app.ask(sound(b"\0\0\0\2"), QUESTION)["usage"]["prompt_tokens"] == plain + SOUND_TOKENS
    both = [image(b"\0\0\0\3"), image(b"\0\0\0\1"), sound(b"\0\0\0\2", "speech"), QUESTION]
    first = app.ask(*both)
    assert first["usage"]["prompt_tokens"] == plain + 2 * IMAGE_TOKENS + SOUND_TOKENS
    assert app.ask(*both)["choices"] == first["choices"]


@the_other_slow
def test_a_file_that_crashes_its_encoder_alone_is_refused_after_the_second_time(app):
    """Those that were in the encoder with it are suspected, run alone, and answered."""
    innocent = [image(bytes([0, 0, 1, n])) for n in range(4)]
    with ThreadPoolExecutor(6) as pool:
        waiting = [pool.submit(app.post, part, QUESTION) for part in innocent[:2]]
        deadly = pool.submit(app.post, image(DEADLY), QUESTION)
        waiting += [pool.submit(app.post, part, QUESTION) for part in innocent[2:]]
        refused = deadly.result()
        answers = [answer.result() for answer in waiting]
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["code"] == "crashes" and error["param"] == "messages.0.content.0"
    assert error["message"] == "messages.0.content.0: this file has crashed its encoder twice, alone in it"
    assert [answer.status_code for answer in answers] == [200] * 4
    # From now on it does not reach the encoder.
    wait_for(app.encoders, 60)
    running = app.encoders()
    assert app.post(text("look:"), image(DEADLY)).status_code == 400
    assert running <= app.encoders()
    assert app.post(image(DEADLY + b" in another way"), QUESTION).status_code == 400
    assert app.ask(innocent[0], QUESTION)["choices"] == answers[0].json()["choices"]


@pytest.mark.slow
@pytest.mark.parametrize("app", ["default"], indirect=True)
def test_a_replica_whose_engine_stops_ends_and_its_answers_go_on(app, tmp_path):
    """An error in the engine's thread, in a process that lives on."""
    right = app.ask(QUESTION, max_completion_tokens=500)["choices"]
    with ThreadPoolExecutor(3) as pool:
        long = [pool.submit(app.ask, QUESTION, max_completion_tokens=500) for _ in range(2)]
        time.sleep(0.3)
        stop = pool.submit(app.post, text(f"{STOP_ENGINE}{tmp_path / 'stopped'}"))
        assert [answer.result()["choices"] for answer in long] == [right] * 2
        assert stop.result().status_code == 200, "it stops one engine only"
    assert (tmp_path / "stopped").exists()


@the_other_slow
def test_too_many_requests_are_asked_to_come_back(app, tmp_path):
    """Eight files at a time and eight that wait are all that this encoder takes."""
    with ThreadPoolExecutor(40) as pool:
        asked = [pool.submit(app.post, held(tmp_path / "go", n), QUESTION) for n in range(40)]
        try:
            first = next(as_completed(asked, timeout=60)).result()
        finally:
            (tmp_path / "go").touch()
        answers = [answer.result() for answer in asked]
    assert first.status_code == 429 and {answer.status_code for answer in answers} == {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert answer.headers["retry-after"] == "2" and answer.json()["error"]["code"] == "busy"
    assert app.post(held(tmp_path / "go", 39), QUESTION).status_code == 200


@the_other_slow
def test_a_client_that_leaves_takes_nobody_with_it(app, tmp_path):
    """Two ask about one new image; whoever asked first leaves while it is being encoded."""
    picture = held(tmp_path / "go")
    with ThreadPoolExecutor(4) as pool:
        leaving = pool.submit(app.post, picture, QUESTION, patience=1)
        time.sleep(0.2)
        staying = [pool.submit(app.post, picture, QUESTION) for _ in range(3)]
        try:
            with pytest.raises(requests.Timeout):
                leaving.result()
            time.sleep(0.2)  # The server notices it.
        finally:
            (tmp_path / "go").touch()
        answers = [answer.result() for answer in staying]
    assert [answer.status_code for answer in answers] == [200] * 3, [answer.text for answer in answers]


@pytest.mark.slow
@pytest.mark.parametrize("app", ["default", "throughput"], indirect=True)
def test_a_redeployment_drops_no_request(app):
    """Long answers are under way and short ones keep coming while every deployment that changed is replaced."""
    right = app.ask(QUESTION, max_completion_tokens=500)["choices"]
    short = app.ask(QUESTION)["choices"]
    done = threading.Event()

    def keep_asking() -> list[requests.Response]:
        answers = []
        while not done.is_set():
            answers.append(app.post(QUESTION))
        return answers

    with ThreadPoolExecutor(4) as pool:
        long = [pool.submit(app.post, QUESTION, max_completion_tokens=500) for _ in range(3)]
        asking = pool.submit(keep_asking)
        app.process.stdin.write("redeploy\n")
        app.process.stdin.flush()
        app.wait_until_ready()
        done.set()
        answers = asking.result()
        assert [answer.result().json().get("choices") for answer in long] == [right] * 3
    assert {answer.status_code for answer in answers} == {200} and len(answers) > 3
    assert all(answer.json()["choices"] == short for answer in answers)
