"""Jobs submitted to a real Ray cluster: the main one on the tiny suite, with evaluation and chat after it; others that
fail, are left and are stopped."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.ports import free_port
from unimoe_ray.errors import UnimoeError
from unimoe_ray.mini.assets import fetch

ROOT = Path(__file__).parents[2]
TASKS = {"image_vqa", "sound_event", "spoken_word", "spoken_question", "text"}
TASKS |= {"video_direction", "video_object", "video_sound"}


@pytest.fixture(scope="module")
def dashboard():
    port = free_port()
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 5,
            "object_store_memory": 300 * 2**20,
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": port,
            "dashboard_agent_listen_port": free_port(),
        },
    )
    yield f"http://127.0.0.1:{port}"
    ray.shutdown()
    cluster.shutdown()


def _start(*arguments: str, cwd: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    # Tests that were started in the background have Ctrl-C ignored, and what they start would ignore it too.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "unimoe_ray.cli", *arguments]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _unimoe(*arguments: str, cwd: Path, seconds: float = 200) -> subprocess.CompletedProcess:
    with _start(*arguments, cwd=cwd) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _told(cwd: Path, *arguments: str) -> str:
    """By ``unimoe jobs``, in a process of its own: one that was a client of a cluster is none of the next."""
    done = _unimoe("jobs", *arguments, cwd=cwd)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.timeout(700)
def test_main_job(dashboard, tmp_path):
    """Out of a folder that is no checkout, whose runs/ and data/ then have the results."""
    try:
        fetch(debian_packages=False)
    except UnimoeError as error:
        pytest.skip(f"mini assets can't be had: {error}")
    steps = ["stages.base.base", "stages.align.align", "stages.tune.tune"]
    steps += [f"stages.experts.{name}" for name in ("image", "speech", "audio")]
    overrides = ["mini.scale=tiny", "evaluation.limit=8", *(f"{step}.steps=2" for step in steps)]
    submitted = ["submit", "jobs/pipeline.py", "--address", dashboard, *overrides]
    done = _unimoe(*submitted, cwd=tmp_path, seconds=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"report: {tmp_path}/runs/mini/report/index.html" in done.stdout
    assert done.stderr.count("\n") == 2 and "succeeded after" in done.stderr.splitlines()[1], done.stderr

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


def test_a_job_that_fails_ends_as_it_does(dashboard, tmp_path):
    """Its mistake is in the output, once; the variable and the neighbouring module have come along."""
    (tmp_path / "mine.py").write_text(
        "import os, sys, words\nprint(os.environ['GIVEN'], sys.argv[1:])\nsys.exit(words.REASON)\n"
    )
    (tmp_path / "words.py").write_text("REASON = 2\n")
    done = _unimoe("submit", "mine.py", "seed=1", "--env", "GIVEN=here", "--address", dashboard, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    given = ["--config", "mini", "seed=1", f"runs_dir={tmp_path}/runs", f"data.dir={tmp_path}/data"]
    assert done.stdout.splitlines()[-1] == f"here {given}"
    assert shlex.join([sys.executable, "mine.py", *given]) in done.stdout
    assert done.stderr.splitlines()[-1].split(" after ")[0].endswith("failed with exit code 2")


def test_ctrl_c_leaves_a_job_that_others_can_follow_and_stop(dashboard, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", dashboard)
    (tmp_path / "wait.py").write_text("import time\nprint('it has begun', flush=True)\ntime.sleep(300)\n")
    with _start("submit", "wait.py", cwd=tmp_path) as process:
        try:
            while "it has begun" not in process.stdout.readline():
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=120)
        finally:
            process.kill()
    job = err.split()[1].rstrip(":")
    assert process.returncode == 1 and job.startswith("wait-")
    assert err.splitlines()[1:] == [
        f"unimoe: {job} goes on; follow it with: unimoe jobs logs -f {job}",
        f"unimoe: stop it with: unimoe jobs stop {job}",
    ]
    assert _told(tmp_path, "status", job).startswith(f"{job} is running, for ")
    assert "it has begun" in _told(tmp_path, "logs", job)
    assert _told(tmp_path, "stop", job) == f"{job} was stopped\n"
    assert _told(tmp_path, "stop", job) == f"{job} was stopped before\n"
    listed = _told(tmp_path, "list").splitlines()
    assert next(line.split()[:3] for line in listed if job in line) == [job, "was", "stopped"]
