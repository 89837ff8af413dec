"""Who writes into a folder of the feature store now: several jobs may, on several machines, and each may die any time.

A writer claims the keys that it is about to encode in a file ``.claims/<owner>``, renewed while it works. Of an owner
on this machine the system knows whether it lives; of one elsewhere, the age of its claim tells: it is dead once that
was not renewed for ``LEASE_S``. Ages are read off the file system's own clock. Claims only save work: blocks are
published by a rename, so two writers of one key leave a sound store.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

LEASE_S = 60.0
_CLAIMS, _LOCK = ".claims", ".lock"


@cache
def _machine() -> str:
    """The same for processes that see each other's process numbers: a boot of a kernel, a container in it."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    return hashlib.sha256(f"{boot}{os.readlink('/proc/self/ns/pid')}".encode()).hexdigest()[:12]


def _started(pid: int) -> str | None:
    """When a process of this machine began, in clock ticks; None if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = text.rpartition(")")[2].split()
    return None if state in ("Z", "X") else fields[18]


def owner() -> str:
    """This process, by a name that no other process ever has."""
    return f"{_machine()}-{os.getpid()}-{_started(os.getpid())}"


def is_alive(who: str, path: Path, now: float) -> bool:
    """Whether the owner of a file still writes; ``now`` as ``locked`` gives it. False for a file that is gone."""
    machine, pid, started = (*who.split("-"), "", "")[:3]
    if machine == _machine() and pid.isdigit():
        return _started(int(pid)) == started
    try:
        return now - path.stat().st_mtime < LEASE_S
    except FileNotFoundError:
        return False


@contextmanager
def locked(folder: Path) -> Iterator[float]:
    """The folder for this process alone, for a moment; gives the file system's time. A killed holder lets go."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.utime(lock.fileno())
        yield os.fstat(lock.fileno()).st_mtime


def claimed(folder: Path, now: float) -> set[str]:
    """Keys that living writers are encoding. Claims of dead ones are removed; call it inside ``locked``."""
    keys: set[str] = set()
    for path in (folder / _CLAIMS).glob("*"):
        if is_alive(path.name, path, now):
            with suppress(FileNotFoundError):  # its writer is done, just now: it takes no lock for that
                keys.update(path.read_text().split())
        else:
            path.unlink(missing_ok=True)
    return keys


@contextmanager
def claim(folder: Path, keys: Iterable[str]) -> Iterator[list[str]]:
    """Claims and gives those of ``keys`` that nobody else has claimed, for the length of the block."""
    mine = folder / _CLAIMS / owner()
    with locked(folder) as now:
        others = claimed(folder, now)
        free = [key for key in keys if key not in others]
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("\n".join(free))
    done = threading.Event()

    def renew() -> None:
        while not done.wait(LEASE_S / 6):
            with suppress(FileNotFoundError):  # another machine may have taken this one for dead, after a standstill
                os.utime(mine)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield free
    finally:
        done.set()
        thread.join()
        mine.unlink(missing_ok=True)
