"""States of two DeepSpeed workers on storages that are slow, full or gone, and what is kept of them."""

from __future__ import annotations

import resource
import threading
import time
from functools import partial
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem

from tests.distributed.worlds import TRAIN, Model, build, micro_batch, run_world
from unimoe_ray.checkpoint import restore
from unimoe_ray.checkpoint.manifest import MANIFEST
from unimoe_ray.checkpoint.saver import Outcome, Saver
from unimoe_ray.checkpoint.states import State, damages, newest_first
from unimoe_ray.checkpoint.storage import Folder
from unimoe_ray.config.checkpoint import CheckpointConfig
from unimoe_ray.config.training import TrainingConfig
from unimoe_ray.errors import UnimoeError
from unimoe_ray.training.engine import backward_step, initialize

DELAY = 0.4


class SlowFileSystem(LocalFileSystem):
    """A disk that opens no file until it is ready, and then takes its time."""

    protocol = "slow"
    ready = threading.Event()

    def open(self, path, mode="rb", **options):
        assert self.ready.wait(200)
        time.sleep(DELAY)
        return super().open(path, mode, **options)


def make_saver(folder: Folder, start: State | None = None, **policy) -> Saver:
    return Saver(folder, CheckpointConfig(every=1, **policy), label="tune", steps=100, decides={"seed": 0}, start=start)


def settled(saver: Saver) -> Outcome | None:
    while (found := saver.outcome()) is None and saver._writing is not None:
        time.sleep(0.01)
    return found


def steps_of(folder: Folder) -> list[int]:
    found = list(newest_first(folder))
    assert all(isinstance(state, State) and not damages(state) for state in found)
    return [state.step for state in reversed(found)]


def work(rank: int, world: int, out: Path) -> None:
    model, groups = build(Model("frozen experts"))
    config = TrainingConfig(precision="fp32")
    engine = initialize(model, groups, config, TRAIN["frozen experts"].weight_decay, torch.device("cpu"))
    backward_step(engine, [micro_batch(0, range(rank * 2, rank * 2 + 2))], 8)
    engine.step()
    policies(engine, rank, Folder(str(out / "policies")))
    slow(engine, rank, Folder(f"slow://{out}/slow"))
    full(engine, rank, Folder(str(out / "full")))
    gone(engine, rank, out / "gone")


def policies(engine, rank: int, folder: Folder) -> None:
    """The last two, every fourth and the best stay; what is damaged, or was begun by the dead, goes when it can."""
    saver = make_saver(folder, keep_last=2, keep_every=4, keep_best=1)
    for step, loss in enumerate([0.9, 0.2, 0.8, 0.7, None, 0.9, None], start=1):
        saver.save_now(engine, step, validation=loss)
        dist.barrier()
    assert steps_of(folder) == [2, 4, 6, 7]
    dist.barrier()
    if rank == 0:
        (newest, *_) = newest_first(folder)
        data = Path(newest.folder.location, newest.manifest.parts[1].name)
        data.write_bytes(data.read_bytes()[:-1])
        (folder / "step-00000008-0a1b2c").make()
    dist.barrier()
    state, warnings = restore.find(folder, {"seed": 0})
    assert state.step == 6 and len(warnings) == 2
    assert "step-00000008-0a1b2c was passed over: it was not committed" in warnings[0]
    assert "part-00001-of-00002.safetensors has" in warnings[1]
    restore.load(engine, state)
    saver = make_saver(folder, state, keep_last=2, keep_every=4, keep_best=1)
    saver.save_now(engine, 7)
    dist.barrier()
    assert steps_of(folder) == [2, 4, 6, 7]
    dist.barrier()  # or what the other rank still reads is gone
    saver.save_now(engine, 7)  # it is there
    saver.finish()
    dist.barrier()
    assert steps_of(folder) == [2, 4]
    dist.barrier()
    make_saver(folder).finish()  # another attempt, which had nothing to write, knows none of them
    dist.barrier()
    assert folder.names() == [] and not Path(folder.location).exists()


def slow(engine, rank: int, folder: Folder) -> None:
    """Steps go on while a state is written; one that is due meanwhile waits, and says how long. A rank whose part is
    written does not wait for those of others, and begins the next state before this one is committed."""
    fsspec.register_implementation("slow", SlowFileSystem, clobber=True)
    saver = make_saver(folder)
    started = time.perf_counter()
    assert saver.save(engine, 1) is None and saver.outcome() is None  # the disk can't have taken anything yet
    took = time.perf_counter() - started
    wait = saver._result

    def wait_for_the_disk() -> Outcome | None:
        SlowFileSystem.ready.set()
        return wait()

    saver._result = wait_for_the_disk
    first = saver.save(engine, 2)
    second = settled(saver)
    assert (first is None) == (rank != 0) == (second is None)
    if rank == 0:
        assert first.step == 1 and second.step == 2 and first.error is second.error is None
        assert first.wait_s + first.copy_s <= took and second.wait_s >= DELAY
        assert first.write_s >= DELAY / 2 and first.commit_s >= DELAY / 2 and first.bytes > 0
    dist.barrier()
    assert steps_of(folder) == [1, 2]


def full(engine, rank: int, folder: Folder) -> None:
    """One rank's disk takes no more: the state before stays, nothing is left of this, and the run goes on or stops."""
    saver = make_saver(folder)
    saver.save_now(engine, 1)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))
    saver.save(engine, 2)
    outcome = settled(saver)
    if rank == 0:
        assert outcome.error.endswith(": File too large (rank 1)") and "step-00000002" in outcome.error
    dist.barrier()
    assert steps_of(folder) == [1] and len(folder.names()) == 1
    dist.barrier()  # or the other rank begins the next
    with pytest.raises(UnimoeError, match="step 3 was not written: .*File too large"):
        saver.save_now(engine, 3)
    stopping = make_saver(folder, on_error="stop")
    stopping.save(engine, 4)
    stops = pytest.raises(
        UnimoeError, match=r"step 4 was not written: .*too large \(rank 1\) \(checkpoint.on_error is stop\)"
    )
    with stops:
        settled(stopping)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    dist.barrier()
    saver.save_now(engine, 5)
    dist.barrier()
    assert steps_of(folder) == [1, 5]


def gone(engine, rank: int, place: Path) -> None:
    """The folder can't be made, and then can."""
    saver = make_saver(Folder(str(place / "states")))
    dist.barrier()
    if rank == 0:
        place.write_text("a file")
    dist.barrier()
    saver.save(engine, 1)
    outcome = settled(saver)
    assert rank or "Not a directory" in outcome.error
    dist.barrier()
    if rank == 0:
        place.unlink()
    dist.barrier()
    saver.save_now(engine, 2)
    assert MANIFEST in (Folder(str(place / "states")) / Folder(str(place / "states")).names()[0]).names()


@pytest.mark.timeout(300)
def test_states_on_storages_of_every_temper(tmp_path):
    run_world(2, partial(work, out=tmp_path))
