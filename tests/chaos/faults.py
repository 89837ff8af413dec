"""Faults for real training runs: what happens to a worker at a step, to a node, or to storage.

Faults of workers reach them through Ray Train's own way for callbacks of an installation, ``RAY_TRAIN_CALLBACKS``: the
code under test knows nothing of them. Each happens once, however often its step is done again.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.train.v2._internal.execution.callback import WorkerCallback

from unimoe_ray.training import interrupt

FILE = "UNIMOE_TEST_FAULTS"
WAIT_S = 600.0
# What happens once all workers have come to the step and written their parts of a state: else it would be chance which
# steps are on record, and which state the run goes on from.
TOGETHER = ("fail", "kill", "hold", "wait")


@dataclass(frozen=True)
class Fault:
    """kind: what happens to ``rank`` (None: every one) when it begins ``step`` (0: every step) of ``run``."""

    kind: str
    rank: int | None = None
    step: int = 0
    run: str | None = None
    seconds: float = 0.0


def fail_at(rank: int, step: int, run: str | None = None) -> Fault:
    """An exception in the training function."""
    return Fault("fail", rank, step, run)


def kill_at(rank: int, step: int, run: str | None = None) -> Fault:
    """SIGKILL."""
    return Fault("kill", rank, step, run)


def terminate_at(rank: int, step: int) -> Fault:
    """SIGTERM: notice that the machine will be taken away."""
    return Fault("terminate", rank, step)


def hang_at(rank: int, step: int) -> Fault:
    """It never goes on."""
    return Fault("hang", rank, step)


def nan_at(step: int) -> Fault:
    """The features of this step's data are not numbers."""
    return Fault("nan", None, step)


def explode_at(step: int) -> Fault:
    """The loss of this step is a million times what it was."""
    return Fault("explode", None, step)


def hold_at(step: int) -> Fault:
    """Workers wait for ``let_go``, for something else to be done at that moment."""
    return Fault("hold", None, step)


def there(folder: Path, run: str, step: int) -> list[Path]:
    """One for each worker that has come to a step of ``TOGETHER``."""
    return list(folder.glob(f"{run.replace('/', '-')}-{step}-*.there"))


def let_go(folder: Path, step: int) -> None:
    (folder / f"go-{step}").touch()


def wait_at(step: int, run: str | None = None) -> Fault:
    """Workers wait until they are asked to save and stop."""
    return Fault("wait", None, step, run)


def slow_storage(seconds: float) -> Fault:
    """Writing a worker's part of a state takes so much longer."""
    return Fault("slow_storage", seconds=seconds)


def pace(seconds: float) -> Fault:
    """Every step takes longer by so much, for others to happen in time."""
    return Fault("pace", seconds=seconds)


@contextmanager
def injected(folder: Path, *faults: Fault) -> Iterator[None]:
    """For the trainings that start inside."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "faults.json"
    path.write_text(json.dumps([asdict(fault) for fault in faults]))
    given = {FILE: str(path), "RAY_TRAIN_CALLBACKS": f"{__name__}.Injector"}
    os.environ |= given
    try:
        yield
    finally:
        for name in given:
            del os.environ[name]


def corrupt_shard(states: Path) -> Path:
    """One byte of the newest state, flipped; the file."""
    newest = max(path.parent for path in states.glob("step-*/manifest.json"))
    part = min(newest.glob("*.safetensors"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    return part


@contextmanager
def small_disk(folder: Path, bytes_: int) -> Iterator[Path]:
    """A file system of its own, in memory. Skips the test where none may be mounted."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={bytes_}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_disk(folder: Path) -> None:
    """No byte is left."""
    try:
        with open(folder / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError as error:
        assert error.errno == errno.ENOSPC


def make_read_only(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


def happened(folder: Path) -> list[str]:
    """Names of the faults that happened: ``kill-1-5``."""
    return sorted(path.stem for path in folder.glob("*.happened"))


class Injector(WorkerCallback):
    """Made by Ray Train in the driver, and carried to each worker."""

    def __init__(self):
        path = Path(os.environ[FILE])
        self._folder, self._faults = path.parent, [Fault(**fault) for fault in json.loads(path.read_text())]

    def after_init_train_context(self) -> None:
        from unimoe_ray.checkpoint import saver
        from unimoe_ray.training import loop

        loop.train_step = self._around(loop.train_step)
        if slow := [fault.seconds for fault in self._faults if fault.kind == "slow_storage"]:
            saver.write_part = _slower(saver.write_part, slow[0])

    def _around(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        import ray.train

        context = ray.train.get_context()
        run, rank = context.get_experiment_name().rsplit("-", 1)[0], context.get_world_rank()
        world = context.get_world_size()
        faults = [fault for fault in self._faults if fault.run is None or fault.run.replace("/", "-") == run]
        mine = [fault for fault in faults if fault.rank in (None, rank)]
        together = {fault.step for fault in faults if fault.kind in TOGETHER}

        def step_with_faults(engine, step, *given):
            if step.number + 1 in together:
                interrupt.finish_writing(WAIT_S)
                (self._folder / f"{run}-{step.number + 1}-{rank}.there").touch()
            for fault in mine:
                if fault.kind == "pace":
                    time.sleep(fault.seconds)
                elif step.number + 1 == fault.step and self._first_time(fault, rank):
                    if fault.kind in TOGETHER:
                        _until(lambda: len(there(self._folder, run, step.number + 1)) >= world)
                    _happen(fault, engine, self._folder)
            return train_step(engine, step, *given)

        return step_with_faults

    def _first_time(self, fault: Fault, rank: int) -> bool:
        name = f"{fault.kind}-{rank}-{fault.step}" + (f"-{fault.run.replace('/', '-')}" if fault.run else "")
        try:
            (self._folder / f"{name}.happened").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def _slower(write: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def write_slowly(*given):
        time.sleep(seconds)
        return write(*given)

    return write_slowly


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _happen(fault: Fault, engine, folder: Path) -> None:
    if fault.kind == "hold":
        _until((folder / f"go-{fault.step}").exists)
    if fault.kind == "wait":
        _until(lambda: any(interrupt.requested()))
    if fault.kind == "fail":
        raise ValueError(f"injected into step {fault.step}")
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.kind == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)
    if fault.kind == "hang":
        while True:
            time.sleep(1)
    if fault.kind in ("nan", "explode"):
        _spoil(engine, np.nan if fault.kind == "nan" else 1e6)


def _spoil(engine, factor: float) -> None:
    """The next loss, and so every gradient, times a factor."""
    forward = engine.module.forward

    def spoiled(*given):
        loss = forward(*given)
        return replace(loss, token_loss=loss.token_loss * factor)

    def once(*given):
        engine.module.forward = forward
        return spoiled(*given)

    engine.module.forward = once
