"""``unimoe serve`` with vLLM behind it. ``UNIMOE_VLLM=FOLDER`` names its environment, made by serve/vllm_env.sh."""

from __future__ import annotations

import os

import pytest

from tests.serving.conftest import Endpoint, serve_run
from tests.serving.media import image, png, text
from tests.serving.test_faults import answer, kill, wait_for
from tests.tiny import make_servable_run

FOLDER = os.environ.get("UNIMOE_VLLM")
pytestmark = [
    pytest.mark.skipif(FOLDER is None, reason="needs vLLM: UNIMOE_VLLM=FOLDER, made by serve/vllm_env.sh"),
    pytest.mark.slow,
    pytest.mark.timeout(500),
]
CONTENTS = ["what is this?", [image(png(1, 300)), text("what shape is it?")], "one two three"]


def answers(endpoint: Endpoint) -> list[tuple[int, str]]:
    return [answer(endpoint, content, max_completion_tokens=24) for content in CONTENTS]


def test_the_endpoint_answers_as_with_our_engine_and_comes_back_when_killed(tmp_path):
    language = {"max_positions": 256, "hidden_size": 64, "num_heads": 2, "num_kv_heads": 1}
    settings = make_servable_run(tmp_path, model={"language": language}).config
    for endpoint in serve_run(settings):
        right = answers(endpoint)
    assert {status for status, _ in right} == {200} and len(set(right)) == len(CONTENTS)
    backend = ["serving.engine.backend=vllm", f"serving.engine.vllm_python={FOLDER}/bin/python"]
    for endpoint in serve_run(settings, *backend):
        assert answers(endpoint) == right
        (replica,) = endpoint.replicas("language")
        (worker,) = [child for child in replica.children() if "unimoe_vllm.worker" in child.cmdline()]
        kill(endpoint, "language")
        wait_for(lambda: not worker.is_running(), 20)  # noqa: B023
        assert answers(endpoint) == right
        assert "Traceback" not in "".join(endpoint.log)
