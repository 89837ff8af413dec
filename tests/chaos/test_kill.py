"""kill -9 of the driver in the middle of stage 2; the same command goes on, and redoes no finished run."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.tiny import make_tiny_run
from unimoe_ray.checkpoint.states import latest, states_folder
from unimoe_ray.training.checkpoint import checkpoint_dir

STEPS = 150


def _start(state: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.chaos.train_experts", str(state)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def _lines(metrics: Path, run: str) -> list[dict]:
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    return [line for line in (json.loads(line) for line in lines if line.endswith("}")) if line["run"] == run]


def _steps(metrics: Path, run: str) -> list[int]:
    return [line["step"] for line in _lines(metrics, run)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_driver_goes_on_from_finished_runs(tmp_path):
    run = make_tiny_run(tmp_path)
    for name in ("speech", "image", "audio"):
        (checkpoint_dir(run.config.run_dir, "experts", name) / "manifest.json").unlink()
    run.config.stages.experts["speech"].steps = STEPS
    state = tmp_path / "run.pickle"
    state.write_bytes(pickle.dumps(run))
    metrics = run.config.run_dir / "metrics.jsonl"
    finished = [checkpoint_dir(run.config.run_dir, "experts", name) / "manifest.json" for name in ("image", "audio")]

    driver = _start(state)
    deadline = time.monotonic() + 300
    while not (all(path.is_file() for path in finished) and latest(run.config, "experts", "speech")):
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    cluster = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    psutil.wait_procs(cluster, timeout=60)  # workers that Ray ends save first
    assert len(_steps(metrics, "experts/speech")) < STEPS
    committed, killed_at = latest(run.config, "experts", "speech"), time.time()
    times = [path.stat().st_mtime_ns for path in finished]
    output, _ = _start(state).communicate(timeout=300)
    assert output.split("trained")[-1].split() == ["experts/speech"]
    lines = _lines(metrics, "experts/speech")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert sum(line["time"] < killed_at for line in lines) == committed
    written = [line["checkpoint"] for line in lines if "checkpoint" in line]
    assert all(state["bytes"] > 0 and state["step"] % 20 == 0 for state in written)
    assert not states_folder(run.config, "experts", "speech").names()
    assert [path.stat().st_mtime_ns for path in finished] == times
    # Nothing of the cluster outlives its driver for long (two agents of Ray notice it after about 40 s).
    gone, alive = psutil.wait_procs(cluster, timeout=120)
    assert not alive, [process.name() for process in alive]
