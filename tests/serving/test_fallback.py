"""An encoder that can't be placed anywhere: the language model's replica does its work."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serving.conftest import Endpoint, serve_run
from tests.serving.media import image, png, sound, text, wav
from tests.serving.test_faults import wait_for

pytestmark = pytest.mark.slow
QUESTION = text("what is this?")


@pytest.fixture(scope="module")
def crippled(servable_run) -> Iterator[Endpoint]:
    """No machine here has a GPU for its image encoder, which goes when nobody needs it and never comes."""
    never = ["num_gpus=1", "min_replicas=0", "initial_replicas=0", "shutdown_timeout_s=1"]
    overrides = [*(f"serving.image.{setting}" for setting in never), "serving.encoder_fallback_s=1"]
    yield from serve_run(servable_run.config, *overrides)


@pytest.mark.timeout(300)
def test_files_are_encoded_in_the_language_replica_where_no_encoder_runs(endpoint, crippled):
    contents = [[image(png(500 + seed)), sound(wav(500 + seed, 0.5)), QUESTION] for seed in range(3)]
    right = [endpoint.chat(content).json()["choices"] for content in contents]
    with ThreadPoolExecutor(6) as pool:  # each of them twice at a time
        answers = list(pool.map(crippled.chat, [*contents, *contents]))
    assert [answer.json().get("choices") for answer in answers] == right * 2
    assert not crippled.replicas("image")
    wait_for(lambda: crippled.metric("encoder_fallbacks_total", kind="image") >= 3, 60)
    assert crippled.metric("encoder_fallbacks_total", kind="audio") == 0
    refused = crippled.chat([image(b"no image"), QUESTION])
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "invalid_media"
