"""The main job on the tiny suite, submitted to a real Ray cluster; then evaluation and chat from the command line."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.job_submission import JobStatus, JobSubmissionClient

from unimoe_ray.errors import UnimoeError
from unimoe_ray.mini.assets import fetch

ROOT = Path(__file__).parents[2]
TASKS = {"image_vqa", "sound_event", "spoken_word", "spoken_question", "text"}
TASKS |= {"video_direction", "video_object", "video_sound"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def dashboard():
    try:
        fetch(debian_packages=False)
    except UnimoeError as error:
        pytest.skip(f"mini assets can't be had: {error}")
    port = _free_port()
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 5,
            "object_store_memory": 300 * 2**20,
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": port,
            "dashboard_agent_listen_port": _free_port(),
        },
    )
    yield f"http://127.0.0.1:{port}"
    ray.shutdown()
    cluster.shutdown()


def _unimoe(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-m", "unimoe_ray.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.timeout(700)
def test_main_job_under_ray_job_submit(dashboard, tmp_path):
    steps = ["stages.base.base", "stages.align.align", "stages.tune.tune"]
    steps += [f"stages.experts.{name}" for name in ("image", "speech", "audio")]
    overrides = ["mini.scale=tiny", f"runs_dir={tmp_path}/runs", f"data.dir={tmp_path}/data", "evaluation.limit=8"]
    overrides += [f"{step}.steps=2" for step in steps]
    client = JobSubmissionClient(dashboard)
    job = client.submit_job(
        entrypoint=f"{sys.executable} -m jobs.pipeline --config mini {' '.join(overrides)}",
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}},
    )
    deadline = time.monotonic() + 500
    while not (status := client.get_job_status(job)).is_terminal():
        assert time.monotonic() < deadline, client.get_job_logs(job)
        time.sleep(1)
    assert status == JobStatus.SUCCEEDED, client.get_job_logs(job)

    run = tmp_path / "runs" / "mini"
    result = json.loads((run / "eval.json").read_text())
    assert set(result["tasks"]) >= TASKS
    assert all(0 <= s["accuracy"] <= 1 and 0 < s["majority"] <= 1 and s["n"] == 8 for s in result["tasks"].values())
    assert set(result["towers"].values()) == {"pretrained"}
    suite = json.loads(next((tmp_path / "data").glob("mini-*/suite.json")).read_text())
    assert result["suite"] == suite["hash"] and result["seed"] == 0 and result["seconds"] > 0
    assert "<html" in (run / "report" / "index.html").read_text()
    stages = [json.loads(line)["run"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert set(stages) == {"base", "align", "experts/image", "experts/speech", "experts/audio", "tune"}

    evaluated = _unimoe("eval", str(run), "--task", "text", "--json", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["tasks"]["text"] == result["tasks"]["text"]

    media = next((tmp_path / "data").glob("mini-*"))
    record = next(r for r in json.loads((media / "test.json").read_text()) if r["task"] == "spoken_question")
    files = ["--image", str(media / record["image"]), "--speech", str(media / record["speech"])]
    asked = _unimoe("chat", str(run), *files, "answer the question", "--json", cwd=tmp_path)
    assert asked.returncode == 0, asked.stderr
    assert isinstance(json.loads(asked.stdout)["answer"], str)
