"""Writers of the feature store that die, meet each other, or come upon damage. No cluster: each is a process here."""

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.stand_in_tower import StandInTower, encodings, pictures, repeats
from tests.tiny import tiny_config
from unimoe_ray.data import claims
from unimoe_ray.data.catalog import Catalog
from unimoe_ray.data.claims import claim, claimed, locked, owner
from unimoe_ray.data.encode import EncodeBlock, EncodeSettings, write_todo
from unimoe_ray.data.features import encode_windows
from unimoe_ray.data.schema import Media, Sample
from unimoe_ray.data.sources import Placed
from unimoe_ray.data.store import DamagedBlock, FeatureStore, StoredFeatures, blocks, mend, mended, write_block
from unimoe_ray.errors import UnimoeError

# Not forked: tests before this one leave threads and handlers of signals in this process.
SPAWN = multiprocessing.get_context("spawn")
BLOCK = 8


@pytest.fixture
def start():
    """Starts a function in a process of its own, which does not outlive the test."""
    started = []

    def begin(function, *arguments):
        started.append(SPAWN.Process(target=function, args=arguments, daemon=True))
        started[-1].start()
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.join()


def wait_for(condition) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


class Work:
    """Pictures to encode, as blocks, and the settings of those who encode them."""

    def __init__(self, root: Path, paths: list[Path], log: Path, seconds: float, **data):
        config = tiny_config(root, data={"encode_batch": BLOCK, **data})
        self.seconds, self.stop = seconds, None
        self.settings = EncodeSettings(str(root / "features"), {"image": "tower"}, 2, config.data, self._tower)
        self.folder, self.todo, self.log = self.settings.partition("image"), root / "todo.arrow", log
        with Catalog(root / "catalog", 2**20) as catalog:
            for index, path in enumerate(paths):
                sample = Sample(str(index), "see", (("<image>", "yes"),), (Media("image", (str(path),)),), {})
                catalog.add("train", Placed(sample, "file", str(index), 0))
            self.blocks = write_todo(catalog, ["image"], self.settings, self.todo)

    def _tower(self, _: str) -> StandInTower:
        return StandInTower(self.log, self.seconds, self.stop)

    def encode(self, job: str, numbers: list[int]) -> list[dict]:
        """What an actor of the pipeline does."""
        actor = EncodeBlock(self.settings, str(self.todo), job, {"image": 0.0})
        return [row for n in numbers for row in actor(pa.table({"block": [n]})).to_pylist()]

    def encode_beside(self, barrier, job: str) -> None:
        barrier.wait(200)
        self.encode(job, list(range(self.blocks)))


def contents(folder: Path) -> dict[str, tuple]:
    store = FeatureStore(folder)
    return {key: (store.lengths(key), store.get(key).values.tobytes()) for key in store._where}


def test_killed_writers_lose_a_block_each_and_leave_no_rubbish(tmp_path, start):
    paths = pictures(tmp_path / "pictures", 5 * BLOCK)
    calm = Work(tmp_path / "calm", paths, tmp_path / "calm.log", 0.0)
    rows = calm.encode("calm", list(range(calm.blocks)))
    assert calm.blocks == 5 and [row["lengths"] for row in rows] == [[4]] * len(paths)
    work = Work(tmp_path / "killed", paths, tmp_path / "killed.log", 0.0)
    for killed, work.stop in enumerate((BLOCK + 3, 3 * BLOCK), start=1):
        process = start(work.encode, f"job{killed}", list(range(work.blocks)))
        wait_for(lambda: len(encodings(work.log)) == work.stop)
        process.kill()
        process.join()
        assert repeats(work.log) <= killed * BLOCK
    (work.folder / f".half.{claims._machine()}-{process.pid}-1").touch()
    said: list[str] = []
    mend(work.folder, said.append)
    assert said == [] and sorted(p.name for p in work.folder.iterdir() if p.name.startswith(".")) == [
        ".claims",
        ".lock",
    ]
    work.stop = None
    work.encode("last", list(range(work.blocks)))
    assert contents(work.folder) == contents(calm.folder) and len(contents(work.folder)) == len(paths)
    assert 0 < repeats(work.log) <= 2 * BLOCK and repeats(calm.log) == 0


def test_two_jobs_with_other_blocks_share_the_work(tmp_path, start):
    paths = pictures(tmp_path / "pictures", 6 * BLOCK)
    log = tmp_path / "log"
    first = Work(tmp_path, paths[: 5 * BLOCK], log, 0.01)
    first.todo = first.todo.rename(tmp_path / "first.arrow")
    second = Work(tmp_path, paths[3:], log, 0.01)
    barrier = SPAWN.Barrier(2)
    jobs = [start(work.encode_beside, barrier, str(n)) for n, work in enumerate((first, second))]
    for job in jobs:
        job.join(200)
        assert job.exitcode == 0
    # What one had left to the other at its time is there in the end.
    missing = first.encode("2", list(range(first.blocks))) + second.encode("3", list(range(second.blocks)))
    assert len(contents(first.folder)) == len(paths) and repeats(log) == 0
    assert len({pid for pid, _ in encodings(log)}) >= 2
    assert all(row["lengths"] is None and row["reason"] is None for row in missing)


def hold(folder: Path, keys: list[str]) -> None:
    with claim(folder, keys):
        time.sleep(600)


def test_claims_of_this_machine_end_with_their_process(tmp_path, start):
    process = start(hold, tmp_path, ["a", "b"])
    wait_for(lambda: list(tmp_path.glob(".claims/*-*")))
    wait_for(lambda: list(tmp_path.glob(".claims/*-*"))[0].read_text() == "a\nb")
    with claim(tmp_path, ["b", "c"]) as mine, locked(tmp_path) as now:
        assert mine == ["c"] and claimed(tmp_path, now) == {"a", "b", "c"}
    process.kill()
    with locked(tmp_path) as now:  # killed or not yet: either is told at once
        wait_for(lambda: claimed(tmp_path, now) == set())
    assert list(tmp_path.glob(".claims/*")) == []
    with claim(tmp_path, ["a", "b"]) as mine:
        assert mine == ["a", "b"]


def test_a_claim_that_ends_while_it_is_looked_at(tmp_path, monkeypatch):
    with claim(tmp_path, ["a"]):
        (path,) = tmp_path.glob(".claims/*")
        monkeypatch.setattr(claims, "is_alive", lambda *_: path.unlink() or True)
        with locked(tmp_path) as now:
            assert claimed(tmp_path, now) == set()


def test_claims_of_other_machines_end_with_their_lease(tmp_path):
    elsewhere = "0123456789ab-1-1"  # process 1 lives here, too: that says nothing about the other machine
    (tmp_path / ".claims").mkdir()
    theirs = tmp_path / ".claims" / elsewhere
    theirs.write_text("a")
    half, mine = tmp_path / f".block.{elsewhere}", tmp_path / f".block.{owner()}"
    long_ago = time.time() - claims.LEASE_S - 5
    for path in (half, mine):
        path.touch()
        os.utime(path, (long_ago, long_ago))
    with claim(tmp_path, ["a", "b"]) as free:
        assert free == ["b"]
    mend(tmp_path, print)
    assert half.exists() and mine.exists()  # their writers live: one renewed its claim, the other is this process
    os.utime(theirs, (long_ago, long_ago))
    mend(tmp_path, print)
    assert not theirs.exists() and not half.exists() and mine.exists()
    with claim(tmp_path, ["a", "b"]) as free:
        assert free == ["a", "b"]


def test_claims_are_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "LEASE_S", 0.3)
    with claim(tmp_path, ["a"]):
        (path,) = tmp_path.glob(".claims/*")
        os.utime(path, (0, 0))
        wait_for(lambda: path.stat().st_mtime > 0)


def one(seed: int, dtype: type = np.float16) -> StoredFeatures:
    return StoredFeatures(np.random.default_rng(seed).normal(size=(2, 3, 5)).astype(dtype), [3, 2])


@pytest.mark.parametrize("damage", ["cut", "empty", "footer", "other"])
def test_damaged_blocks_are_found_and_dropped(tmp_path, damage):
    write_block(tmp_path, ["a"], [one(0)])
    bad = write_block(tmp_path, ["b", "c"], [one(1), one(2)])
    whole = bad.read_bytes()
    assert mended(tmp_path) == 0
    if damage == "other":
        with pa.OSFile(str(bad), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("x", pa.int64())])):
            pass
    else:
        bad.write_bytes({"cut": whole[:-100], "empty": b"", "footer": whole[:-9] + bytes(9)}[damage])
    assert mended(tmp_path) == -1
    with pytest.raises(DamagedBlock, match=f"{bad}: .*'unimoe prepare' encodes its media again"):
        FeatureStore(tmp_path)
    said: list[str] = []
    mend(tmp_path, said.append)
    assert len(said) == 1 and str(bad) in said[0] and len(blocks(tmp_path)) == 1
    assert len(FeatureStore(tmp_path)) == 1 and mended(tmp_path) > 0


def test_a_partition_of_fp32(tmp_path):
    paths = pictures(tmp_path / "pictures", 3)
    work = {d: Work(tmp_path / d, paths, tmp_path / "log", 0.0, store_dtype=d) for d in ("fp16", "fp32")}
    for each in work.values():
        each.encode("job", [0])
    assert [each.folder.name for each in work.values()] == ["tower", "tower-fp32"]
    half, full = (FeatureStore(each.folder) for each in work.values())
    for key in full._where:
        assert full.get(key).values.dtype == np.float32 and full.get(key).values.any()
        assert np.array_equal(full.get(key).values.astype(np.float16), half.get(key).values)


def test_values_beyond_fp16_are_refused_not_stored_as_infinity(tmp_path):
    tower, big = StandInTower(tmp_path / "log"), [np.full((1, 4, 12), 1e5, np.float32)]
    with pytest.raises(UnimoeError, match="beyond the range of float16: data.store_dtype=fp32"):
        encode_windows(tower, big)
    assert (encode_windows(tower, big, np.dtype(np.float32))[0].values == 1e5).all()
