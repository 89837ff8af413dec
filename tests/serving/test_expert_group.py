"""A replica of the language model as a group of actors, on real Ray Serve: answers, a member that dies."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import psutil
import pytest

from tests.serving.conftest import Endpoint, serve_run
from tests.serving.test_faults import LONG, PICTURE, QUESTIONS, answer, listen, replaced, under_load, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def grouped(servable_run) -> Iterator[Endpoint]:
    """Two members. Experts may move after every 50 steps, for the smallest gain, and moving costs nothing."""
    group = [f"serving.language.expert_parallel.{setting}" for setting in ("size=2", "num_cpus=0.5", "interval=50")]
    planning = ["placement.tflops=1e-9", "placement.min_gain=0.001"]
    others = ["serving.limits.request_seconds=120", "serving.engine.messages_per_s=1000"]
    yield from serve_run(servable_run.config, *group, *planning, *others)


def members(endpoint: Endpoint) -> list[int]:
    found = []
    for child in psutil.Process(endpoint.process.pid).children(recursive=True):
        try:
            if " ".join(child.cmdline()).startswith("ray::ExpertMember"):
                found.append(child.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def test_answers_are_those_of_a_single_process_also_when_a_member_dies(grouped, endpoint):
    questions = [{"content": QUESTIONS[1], **LONG}, {"content": PICTURE, "expert_load": True, **LONG}]
    questions.append({"content": QUESTIONS[2], "temperature": 1.2, "seed": 1, **LONG})
    right = [listen(grouped, question) for question in questions]
    assert all(told.done and len(told.text) > 50 for told in right)
    alone = [listen(endpoint, question) for question in questions]
    assert [told.same() for told in right] == [told.same() for told in alone]

    (before, other), (replica,) = members(grouped), grouped.replicas("language")
    far = threading.Semaphore(0)
    jobs = [lambda q=q: listen(grouped, q, far) for q in questions]
    when = lambda: [far.acquire(timeout=60) for _ in questions]  # noqa: E731
    results = under_load(jobs, lambda: os.kill(before, signal.SIGKILL), when)
    assert [told.same() for told in results] == [told.same() for told in right]
    wait_for(lambda: not replica.is_running() and replaced(grouped, "language", replica.pid), 60)
    wait_for(lambda: len(members(grouped)) == 2 and not {before, other} & set(members(grouped)), 120)


def test_a_member_that_dies_while_nobody_asks_is_missed_too(grouped):
    right = answer(grouped, QUESTIONS[3], **LONG)
    (replica,) = grouped.replicas("language")
    os.kill(members(grouped)[1], signal.SIGKILL)
    wait_for(lambda: replaced(grouped, "language", replica.pid) and not replica.is_running(), 60)
    assert answer(grouped, QUESTIONS[3], **LONG) == right
    assert "Traceback" not in "".join(grouped.log)
