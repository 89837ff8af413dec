"""Jobs on a real cluster that wants a token, and on one without a job agent. Each needs a cluster of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.ports import free_port

ROOT = Path(__file__).parents[2]
TOKEN = "sesame-0123456789abcdef0123456789abcdef"
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
port, agent = map(int, sys.argv[1:])
cluster = Cluster(initialize_head=True, head_node_args=dict(
    num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=True, dashboard_host="127.0.0.1",
    dashboard_port=port, dashboard_agent_listen_port=agent))
print("ready", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""

pytestmark = pytest.mark.slow


@contextmanager
def running(agent_port: int, **variables: str):
    """Addresses of a cluster in a process of its own: of the dashboard, and as ray.init takes it."""
    port = free_port()
    command = [sys.executable, "-c", CLUSTER, str(port), str(agent_port)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | variables, **pipes) as process:
        try:
            while not (line := process.stdout.readline()).startswith("ready "):
                assert process.poll() is None, line
            yield f"http://127.0.0.1:{port}", line.split()[1]
        finally:
            process.stdin.close()
            process.wait(120)


def _unimoe(*arguments: str, cwd: Path, **variables: str) -> tuple[int, str]:
    """Exit code and all output of a command without what this process knows of tokens."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    command = [sys.executable, "-m", "unimoe_ray.cli", *arguments]
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment | {"PYTHONPATH": str(ROOT), "HOME": str(cwd)} | variables,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert TOKEN not in done.stdout + done.stderr
    return done.returncode, done.stdout + done.stderr


@pytest.mark.timeout(600)
def test_a_cluster_with_a_token(tmp_path):
    (tmp_path / "hello.py").write_text("print('hello from the job')\n")
    token = tmp_path / "token"
    token.write_text(TOKEN)
    with running(free_port(), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN) as (url, address):
        for given, line in (
            ({}, f"unimoe: {url}: the cluster wants its token; set RAY_AUTH_TOKEN_PATH to a file that holds it"),
            (
                {"RAY_AUTH_TOKEN_PATH": "/gone"},
                f"unimoe: {url}: the cluster wants its token; RAY_AUTH_TOKEN_PATH=/gone",
            ),
            ({"RAY_AUTH_TOKEN": TOKEN[::-1]}, f"unimoe: {url}: the token of RAY_AUTH_TOKEN is not the one of this"),
        ):
            code, out = _unimoe("submit", "hello.py", "--address", url, cwd=tmp_path, **given)
            assert code == 1 and out.startswith(line) and out.count("\n") == 1, out

        for where, given in ((url, {"RAY_AUTH_TOKEN": TOKEN}), (address, {"RAY_AUTH_TOKEN_PATH": str(token)})):
            code, out = _unimoe("submit", "hello.py", "--address", where, cwd=tmp_path, **given)
            assert code == 0 and out.count("hello from the job") == 1, out


@pytest.mark.timeout(600)
def test_a_cluster_whose_agents_port_is_taken(tmp_path):
    (tmp_path / "hello.py").write_text("print('hello from the job')\n")
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        with running(taken.getsockname()[1], RAY_AUTH_MODE="disabled") as (url, _):
            code, out = _unimoe("submit", "hello.py", "--address", url, cwd=tmp_path)
    assert code == 1 and "the cluster has no job agent" in out.splitlines()[-1], out
