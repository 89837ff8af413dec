"""The node of a language replica goes without a word: no connection breaks, nothing comes over it any more."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psutil
import pytest
from ray.cluster_utils import Cluster

from tests.chaos.nodes import raylet
from tests.serving.conftest import Endpoint, serve_run
from tests.serving.test_faults import LONG, answer, wait_for

pytestmark = pytest.mark.slow
QUESTION = "what is this?"
LANGUAGE_CPUS = 5
# The head finds out in seconds rather than a minute.
SOON = {"period_ms": 1000, "timeout_ms": 1000, "initial_delay_ms": 1000, "failure_threshold": 3}


@contextmanager
def silent(node: psutil.Process) -> Iterator[list[psutil.Process]]:
    """All processes of a node stand still, their connections stay: for the others, its power was cut."""
    stopped = [node, *node.children(recursive=True)]
    for process in stopped:
        process.suspend()
    try:
        yield stopped
    finally:
        for process in stopped:
            process.kill()


def of_node(node: psutil.Process, title: str) -> list[psutil.Process]:
    return [child for child in node.children(recursive=True) if " ".join(child.cmdline()).startswith(title)]


@pytest.fixture
def spread_out(servable_run, monkeypatch) -> Iterator[tuple[Endpoint, psutil.Process, Cluster]]:
    """Ingress and encoders in the head, the language model in a node that joins once they are there."""
    for name, value in SOON.items():
        monkeypatch.setenv(f"RAY_health_check_{name}", str(value))
    head = {"num_cpus": LANGUAGE_CPUS - 1, "include_dashboard": False, "object_store_memory": 200 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        first, title = raylet(cluster.head_node), f"ray::ServeReplica:{servable_run.config.name}:"
        wanted = {title + name for name in ("ingress", "image", "speech", "audio")}

        settings = [f"ray_address={cluster.address}", f"serving.language.num_cpus={LANGUAGE_CPUS}"]
        settings += ["serving.engine.threads=1", "serving.engine.messages_per_s=1000"]
        serving = serve_run(servable_run.config, *settings)
        with ThreadPoolExecutor(1) as pool:
            ready = pool.submit(next, serving)
            wait_for(lambda: ready.done() or all(of_node(first, name) for name in wanted), 120)
            cluster.add_node(num_cpus=LANGUAGE_CPUS, include_dashboard=False)
            yield ready.result(), first, cluster
        serving.close()
    finally:
        cluster.shutdown()


@pytest.mark.timeout(600)
def test_streams_go_on_when_the_node_of_the_language_model_is_lost(spread_out):
    endpoint, first, cluster = spread_out
    (node,) = cluster.worker_nodes
    assert of_node(raylet(node), f"ray::ServeReplica:{endpoint.model}:language")
    right = answer(endpoint, QUESTION, **LONG)
    (proxy,) = of_node(first, "ray::ProxyActor")

    def through_the_head():
        """A stream through its proxy: the one of the other node listens on the same port."""
        while True:
            reply = endpoint.chat(QUESTION, stream=True, **LONG)
            ours = reply.raw._connection.sock.getsockname()[1]
            if any(connection.raddr and connection.raddr.port == ours for connection in proxy.net_connections("tcp")):
                return reply
            reply.close()

    lines = through_the_head().iter_lines()
    early = [next(lines) for _ in range(9)]
    with silent(raylet(node)) as stopped:
        began = time.monotonic()
        cluster.add_node(num_cpus=LANGUAGE_CPUS, include_dashboard=False)
        events = [line.decode().removeprefix("data: ") for line in [*early, *lines] if line]
        seconds = time.monotonic() - began
        assert {process.status() for process in stopped} == {psutil.STATUS_STOPPED}
    assert events.pop() == "[DONE]"
    choices = [choice for event in map(json.loads, events) for choice in event["choices"]]
    assert (200, "".join(choice["delta"].get("content", "") for choice in choices)) == right
    assert seconds < 50, "gRPC itself finds out after a minute"
