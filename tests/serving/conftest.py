"""A running endpoint: the command line's own ``unimoe serve`` on a small model of random weights, on real Ray Serve."""

from __future__ import annotations

import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import requests

from tests.ports import free_port
from tests.serving.scripted import no_traceback, site  # noqa: F401 fixtures
from tests.serving.sites import names  # noqa: F401 a fixture
from tests.tiny import TinyRun, make_servable_run
from unimoe_ray.config import Config

ROOT = Path(__file__).parents[2]
STARTUP_S = 240


@dataclass(frozen=True)
class Endpoint:
    """``unimoe serve`` in a process of its own. log: what it printed so far."""

    url: str
    model: str
    config: Config
    process: subprocess.Popen
    log: list[str]
    ready_s: float

    def chat(self, content, headers: dict[str, str] | None = None, **rest) -> requests.Response:
        """POST /v1/chat/completions with one user message (or the list of all), greedy unless told otherwise."""
        messages = content if isinstance(content, list) and "role" in content[0] else [_user(content)]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_completion_tokens": 8} | rest
        options = {"headers": headers, "stream": body.get("stream", False), "timeout": 120}
        return requests.post(f"{self.url}/v1/chat/completions", json=body, **options)

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """Processes of a deployment's replicas."""
        return replicas_below(self.process, self.model, deployment)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples with these labels, as /metrics has it now (Ray reports every two seconds)."""
        pattern = re.compile(rf"^ray_unimoe_{name}{{(.*)}} (\S+)$", re.MULTILINE)
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        page = requests.get(f"{self.url}/metrics", timeout=30).text
        return sum(float(value) for shown, value in pattern.findall(page) if all(label in shown for label in wanted))


def _user(content) -> dict:
    return {"role": "user", "content": content}


def replicas_below(process: subprocess.Popen, app: str, deployment: str) -> list[psutil.Process]:
    title, found = f"ray::ServeReplica:{app}:{deployment}", []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if " ".join(child.cmdline()).startswith(title):
                found.append(child)
    return found


def serve_run(config: Config, *overrides: str, **environment: str) -> Iterator[Endpoint]:
    """Start ``unimoe serve``, yield the endpoint, stop it as Ctrl-C does."""
    command = [
        sys.executable,
        "-m",
        "unimoe_ray.cli",
        "serve",
        str(config.run_dir.resolve()),
        "--port",
        str(free_port()),
    ]
    started = time.monotonic()
    process = subprocess.Popen(
        [*command, *overrides],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=config.run_dir,
    )
    log: list[str] = []
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            log.append(line)
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    url = None
    try:
        while url is None:
            line = lines.get(timeout=max(0.1, STARTUP_S - (time.monotonic() - started)))
            assert line is not None, "".join(log)
            url = next(iter(re.findall(r"page +(http://\S+)", line)), None)
        yield Endpoint(url, config.name, config, process, log, time.monotonic() - started)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()


@pytest.fixture(scope="session")
def servable_run(tmp_path_factory) -> TinyRun:
    language = {"max_positions": 512, "hidden_size": 32, "num_heads": 2, "num_kv_heads": 1}
    return make_servable_run(tmp_path_factory.mktemp("serving"), model={"language": language})


@pytest.fixture(scope="session")
def traces(tmp_path_factory) -> Path:
    """Where the endpoint's spans go."""
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="session")
def endpoint(servable_run, traces) -> Iterator[Endpoint]:
    yield from serve_run(servable_run.config, f"serving.tracing={traces}")
