"""Processes that wait to take over: a killed worker's place is taken by one that has everything imported."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.chaos import faults, runs
from tests.chaos.runs import Undisturbed
from unimoe_ray import cluster
from unimoe_ray.training import standby


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_workers_that_start_anew_are_processes_that_waited(tmp_path):
    run = runs.make_run(tmp_path)
    with cluster.connect(run.config):
        undisturbed = Undisturbed.of(run)

        def two_are_ready() -> None:
            deadline = time.monotonic() + 120
            while len(list(standby.requests().glob("ready-*"))) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.1)

        run.config.training.elastic.standby_every = 0.5
        folder = tmp_path / "faults"
        follow = runs.at(run, folder, {6: two_are_ready})
        runs.again(run)
        with faults.injected(folder, faults.hold_at(6), faults.kill_at(1, 7)):
            runs.train(run, follow=follow)
        runs.same(run, undisturbed)
        (recovery,) = runs.recoveries(run)
        assert recovery["standby"] and recovery["import_s"] < 0.5


def test_only_processes_that_wait_or_will_are_counted(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / f"ready-{gone.pid}").touch()
    (tmp_path / f"ready-{os.getpid()}").touch()  # it has another name, as one that was taken
    assert standby.waiting(tmp_path) == 0
    with subprocess.Popen(["sleep", "60"], executable="/bin/sleep") as busy:
        (tmp_path / f"importing-{busy.pid}").touch()
        assert standby.waiting(tmp_path) == 0
        busy.kill()
    with subprocess.Popen(["ray::IDLE", "60"], executable="/bin/sleep") as idle:
        while not Path(f"/proc/{idle.pid}/cmdline").read_bytes():  # The kernel sets it a moment after the start.
            time.sleep(0.01)
        (tmp_path / f"ready-{idle.pid}").touch()
        assert standby.waiting(tmp_path) == 1
        idle.kill()
    (tmp_path / "wanted-1").touch()
    assert standby.waiting(tmp_path) == 1
    long_ago = time.time() - 2 * standby.START_S
    os.utime(tmp_path / "wanted-1", (long_ago, long_ago))
    assert standby.waiting(tmp_path) == 0


def test_imports_ask_cuda_nothing():
    """Devices that a process has seen before Ray tells it which ones are its own would stay its devices."""
    code = (
        "import torch\n"
        "def asked(*_): raise SystemExit('CUDA was asked')\n"
        "torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = asked\n"
        "import unimoe_ray.training.loop\n"
        "print('imported')"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=280)
    assert (done.stdout.strip(), done.returncode) == ("imported", 0), done.stderr
