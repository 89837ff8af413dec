"""Embeddings of the 7B model's sizes through the real Serve path, in its default and in its throughput mode.

The throughput mode sends what is passed by value over gRPC, whose messages end at 4 MiB: an image is 4.7 MB, a sound of
20 windows 8.2 MB.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import requests

from tests.serving.conftest import ROOT, free_port
from tests.serving.media import image, sound, text
from tests.tiny import TinyRun, make_servable_run

MODES = {
    "default": {},
    "throughput": {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # else every end takes 30 s
    },
}
IMAGE_TOKENS, SOUND_TOKENS = 576, 1000


@pytest.fixture(scope="module")
def wide_run(tmp_path_factory) -> TinyRun:
    """One layer of the 7B model's width; everything else as small as it goes."""
    language = {"hidden_size": 4096, "intermediate_size": 16, "num_layers": 1, "num_heads": 32, "num_kv_heads": 1}
    return make_servable_run(
        tmp_path_factory.mktemp("wide"),
        model={"language": language | {"max_positions": 4096}},
        serving={"engine": {"kv_tokens": 8192}},
    )


@pytest.fixture(params=MODES)
def url(request, wide_run) -> Iterator[str]:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.serving.real_size", str(wide_run.config.run_dir), str(port)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | MODES[request.param],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    printed = []
    try:
        for line in process.stdout:
            printed.append(line)
            if line == "ready\n":
                break
        else:
            pytest.fail("".join(printed))
        yield f"http://127.0.0.1:{port}"
    finally:
        process.stdin.close()
        process.wait(60)


@pytest.mark.timeout(280)
def test_embeddings_of_the_real_size(url, wide_run):
    def ask(*parts: dict) -> dict:
        body = {"model": wide_run.config.name, "messages": [{"role": "user", "content": list(parts)}]}
        reply = requests.post(
            f"{url}/v1/chat/completions", json=body | {"temperature": 0, "max_completion_tokens": 3}, timeout=120
        )
        assert reply.status_code == 200, reply.text
        return reply.json()

    question = text("what is this?")
    plain = ask(question)["usage"]["prompt_tokens"]
    assert ask(image(b"\0\0\0\1"), question)["usage"]["prompt_tokens"] == plain + IMAGE_TOKENS
    assert ask(sound(b"\0\0\0\2"), question)["usage"]["prompt_tokens"] == plain + SOUND_TOKENS
    both = [image(b"\0\0\0\3"), image(b"\0\0\0\1"), sound(b"\0\0\0\2", "speech"), question]
    first = ask(*both)
    assert first["usage"]["prompt_tokens"] == plain + 2 * IMAGE_TOKENS + SOUND_TOKENS
    started = time.monotonic()
    assert ask(*both)["choices"] == first["choices"]
    assert time.monotonic() - started < 60
