"""An endpoint with two ingress replicas, API keys and little room: who is let in, and what more traffic than it has
room for does to it.

UNIMOE_LOAD_S: seconds of the long traffic (default: 180).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import psutil
import pytest
import requests

from tests.serving.conftest import Endpoint, serve_run
from tests.serving.media import image, png, text
from tests.tiny import make_servable_run

pytestmark = pytest.mark.slow
MAX_WAIT_S = 3.0
LOAD_S = float(os.environ.get("UNIMOE_LOAD_S", 180))
SECRETS = {"free": "sk-free", "few": "sk-few"}
KEYS = [
    {"name": name, "sha256": hashlib.sha256(secret.encode()).hexdigest(), "key_class": name}
    for name, secret in SECRETS.items()
]
QUESTIONS = [f"what is this? number {number}" for number in range(8)]
PICTURES = {f"picture {seed}": [image(png(seed, 300)), text("what is this?")] for seed in range(4)}


@pytest.fixture(scope="module")
def policed(tmp_path_factory) -> Iterator[Endpoint]:
    """Its model is large enough to be what takes the time, and not the way to it."""
    language = {"max_positions": 512, "hidden_size": 512, "intermediate_size": 1024, "num_layers": 8, "num_heads": 8}
    run = make_servable_run(tmp_path_factory.mktemp("policed"), model={"language": language | {"num_kv_heads": 8}})
    overrides = [
        f"serving.keys={json.dumps(KEYS)}",
        'serving.key_classes={"free": {"priority": 1}, "few": {"requests_per_minute": 6}}',
        "serving.ingress.min_replicas=2",
        "serving.engine.max_running=4",
        f"serving.limits.max_wait_s={MAX_WAIT_S}",
    ]
    yield from serve_run(run.config, *overrides)


@dataclass(frozen=True)
class Reply:
    status: int
    text: str
    seconds: float
    retry_after: str | None


def ask(endpoint: Endpoint, question: str, key: str = "free", tokens: int = 40) -> Reply:
    begun, content = time.monotonic(), PICTURES.get(question, [text(question)])
    body = {"model": endpoint.model, "messages": [{"role": "user", "content": content}], "temperature": 0}
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


def burst(endpoint: Endpoint, seconds: float, questions: list[str]) -> None:
    """Open-loop traffic at 1.5 times of what the model answers when as many as it has room for ask again and again."""
    right = {question: ask(endpoint, question).text for question in questions}
    assert len(set(right.values())) == len(questions)
    with ThreadPoolExecutor(4) as pool:
        begun = time.monotonic()
        closed = list(pool.map(lambda n: ask(endpoint, questions[n % len(questions)]), range(60)))
        capacity = 60 / (time.monotonic() - begun)
    alone = max(reply.seconds for reply in closed)
    rng, at, asked = random.Random(1), 0.0, []
    with ThreadPoolExecutor(400) as pool:
        begun = time.monotonic()
        while at < seconds:
            time.sleep(max(0.0, begun + at - time.monotonic()))
            question = rng.choice(questions)
            asked.append((question, pool.submit(ask, endpoint, question)))
            at += rng.expovariate(1.5 * capacity)
        replies = [(question, reply.result(timeout=120)) for question, reply in asked]
    accepted = [reply.seconds for _, reply in replies if reply.status == 200]
    p50, p99 = np.percentile(accepted, [50, 99])
    print(
        f"capacity {capacity:.1f}/s, longest answer below it {alone:.2f} s; {len(replies)} asked in {seconds:g} s: "
        f"{Counter((reply.status, reply.text if reply.status != 200 else '') for _, reply in replies)}; "
        f"accepted p50 {p50:.2f} s, p99 {p99:.2f} s"
    )
    assert all(reply.text == right[question] for question, reply in replies if reply.status == 200)
    sent_away = [reply for _, reply in replies if reply.status != 200]
    assert {reply.status for reply in sent_away} <= {429, 503}
    assert all(int(reply.retry_after) >= 1 for reply in sent_away)
    assert 0.5 * len(replies) < len(accepted)
    assert p99 < 2 * MAX_WAIT_S + 2 * alone
    assert ask(endpoint, questions[0]).text == right[questions[0]]


@pytest.mark.timeout(150)
def test_a_burst_above_capacity(policed):
    burst(policed, 10, QUESTIONS)


def memory(endpoint: Endpoint) -> dict[str, float]:
    """MB that belong to a deployment's replicas and to the proxy alone."""
    kinds = {name: endpoint.replicas(name) for name in ("ingress", "language", "image")}
    children = psutil.Process(endpoint.process.pid).children(recursive=True)
    kinds["proxy"] = [child for child in children if " ".join(child.cmdline()).startswith("ray::ProxyActor")]
    return {name: sum(one.memory_full_info().uss for one in found) / 1e6 for name, found in kinds.items()}


@pytest.mark.timeout(300 + 2 * LOAD_S)
def test_minutes_above_capacity_leave_memory_as_it_was(policed):
    """Texts and pictures; nothing crashes, every request has its answer or is sent away."""
    questions = [*QUESTIONS, *PICTURES]
    burst(policed, min(60.0, LOAD_S / 3), questions)  # What is kept for reuse has grown by then.
    before, pids = memory(policed), {one.pid for one in policed.replicas("language") + policed.replicas("ingress")}
    burst(policed, LOAD_S, questions)
    after = memory(policed)
    print(", ".join(f"{name} {before[name]:.0f} to {after[name]:.0f} MB" for name in before))
    assert {one.pid for one in policed.replicas("language") + policed.replicas("ingress")} == pids
    assert all(after[name] < 1.1 * before[name] + 20 for name in before)
