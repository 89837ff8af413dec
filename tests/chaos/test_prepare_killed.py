"""The preparing process and all that it started, killed at random moments: the store is as if nothing had happened."""

import contextlib
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.stand_in_tower import encodings, repeats
from unimoe_ray.data.store import FeatureStore

ROOT = Path(__file__).resolve().parents[2]
PICTURES, BLOCK, WORKERS, KILLS = 480, 8, 2, 10


def begin(folder: Path, seconds: float) -> psutil.Popen:
    folder.mkdir(exist_ok=True)
    arguments = [folder, PICTURES, seconds]
    return psutil.Popen(
        [sys.executable, "-m", "tests.chaos.prepare_pictures", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=(folder / "errors").open("a"),
        start_new_session=True,
    )


def kill_all(process: psutil.Popen) -> None:
    """kill -9 of the process and of everything below it."""
    tree = [process, *process.children(recursive=True)] if process.poll() is None else []
    for each in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()


def contents(folder: Path) -> dict[str, tuple]:
    store = FeatureStore(folder / "features" / "image" / "tower")
    return {key: (store.lengths(key), store.get(key).values.tobytes()) for key in store._where}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_kills(tmp_path):
    chance = random.Random(time.time_ns())
    killed, calm = tmp_path / "killed", tmp_path / "calm"
    log, marks = killed / "log", [0]
    for kill in range(KILLS):
        process = begin(killed, 0.1)
        try:
            if kill % 5 == 0:  # while it starts, too
                time.sleep(chance.uniform(0, 10))
            else:
                while len(encodings(log)) == marks[-1]:
                    time.sleep(0.05)
                    assert process.poll() is None, (killed / "errors").read_text()
                time.sleep(chance.uniform(0, 2))
            assert process.poll() is None, (killed / "errors").read_text()
        finally:
            kill_all(process)
        marks.append(len(encodings(log)))
    assert begin(killed, 0.0).wait() == 0, (killed / "errors").read_text()
    assert begin(calm, 0.0).wait() == 0, (calm / "errors").read_text()
    assert contents(killed) == contents(calm) and len(contents(calm)) == PICTURES
    done = [crc for _, crc in encodings(log)]
    lost = [len(set(done[a:b]) & set(done[b:])) for a, b in zip(marks, marks[1:], strict=False)]
    print(f"encoded before each kill: {marks[1:]}; encoded again because of it: {lost}; in all {repeats(log)}")
    assert max(lost) <= WORKERS * BLOCK and repeats(log) == sum(lost) > 0
    left = [path.name for path in (killed / "features").rglob(".*") if path.name not in (".lock", ".claims")]
    left += [path.name for path in (killed / "runs").rglob(".*")]
    assert left == [] and list((killed / "features").rglob(".claims/*")) == []
