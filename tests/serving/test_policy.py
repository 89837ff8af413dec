"""An endpoint with two ingress replicas, API keys and little room: who is let in."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import requests

from tests.serving.conftest import Endpoint, serve_run
from tests.serving.media import text

pytestmark = pytest.mark.slow
MAX_WAIT_S = 3.0
SECRETS = {"free": "sk-free", "few": "sk-few"}
KEYS = [
    {"name": name, "sha256": hashlib.sha256(secret.encode()).hexdigest(), "key_class": name}
    for name, secret in SECRETS.items()
]
QUESTIONS = [f"what is this? number {number}" for number in range(8)]


@pytest.fixture(scope="module")
def policed(servable_run) -> Iterator[Endpoint]:
    overrides = [
        f"serving.keys={json.dumps(KEYS)}",
        'serving.key_classes={"free": {"priority": 1}, "few": {"requests_per_minute": 6}}',
        "serving.ingress.min_replicas=2",
        "serving.engine.max_running=4",
        f"serving.limits.max_wait_s={MAX_WAIT_S}",
    ]
    yield from serve_run(servable_run.config, *overrides)


@dataclass(frozen=True)
class Reply:
    status: int
    text: str
    seconds: float
    retry_after: str | None


def ask(endpoint: Endpoint, question: str, key: str = "free", tokens: int = 120) -> Reply:
    begun = time.monotonic()
    body = {"model": endpoint.model, "messages": [{"role": "user", "content": [text(question)]}], "temperature": 0}
    body |= {"max_completion_tokens": tokens, "stop": ["~~~~"]}
    headers = {"Authorization": f"Bearer {SECRETS[key]}"}
    answer = requests.post(f"{endpoint.url}/v1/chat/completions", json=body, headers=headers, timeout=120)
    told = answer.json()
    said = told["choices"][0]["message"]["content"] if answer.status_code == 200 else told["error"]["code"]
    return Reply(answer.status_code, said, time.monotonic() - begun, answer.headers.get("retry-after"))


def test_a_limit_is_one_over_all_ingress_replicas(policed):
    begun = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda _: ask(policed, QUESTIONS[0], "few", tokens=1), range(16)))
    allowed = sum(reply.status == 200 for reply in replies)
    assert 6 <= allowed <= 6 + (time.monotonic() - begun) / 10
    refused = [reply for reply in replies if reply.status != 200]
    assert {(reply.status, reply.text) for reply in refused} == {(429, "rate_limit_exceeded")}
    assert all(1 <= int(reply.retry_after) <= 10 for reply in refused)
    assert len(policed.replicas("ingress")) == 2
    assert ask(policed, QUESTIONS[0]).status == 200
