"""What failures cost a run: restarts, steps done again, time until the next new step, and goodput.

``events.jsonl`` of the run folder has a line for each start of workers, failure and bad step, written where it is
noticed; from it and the steps in ``metrics.jsonl``, rank 0 gets what it adds to the lines of the steps.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
# Events: the driver began; workers are being started; they go on from a state; their first step is done; they stopped,
# planned or not; a step was bad, and the run goes back behind it.
DRIVER, START, RESUME, RECOVERED, STOP, BAD_STEP = "driver", "start", "resume", "recovered", "stop", "bad_step"
TAIL_BYTES = 1 << 16

_marks: dict[str, float] = {}


def mark(name: str) -> None:
    """This process has come to ``name``, one of ``waiting``, ``entered``, ``imported``, ``restored``."""
    _marks[name] = time.time()


def append(path: Path, line: dict[str, Any]) -> None:
    """Each line in one write: several processes append to the same file, and any may be killed."""
    with open(path, "ab", buffering=0) as file:
        file.write(json.dumps(line).encode() + b"\n")


def write_event(folder: Path, run: str, event: str, **what: Any) -> None:
    """text: for people, of what is to be shown to them."""
    append(folder / EVENTS, {"event": event, "run": run, "time": round(time.time(), 3)} | what)


def read_lines(path: Path, run: str) -> Iterator[dict[str, Any]]:
    """The lines of a run; a damaged one, which a killed process may leave, is left out."""
    if path.is_file():
        with open(path, "rb") as file:
            for line in file:
                found = _parsed(line)
                if found is not None and found.get("run") == run:
                    yield found


def last_line(folder: Path, run: str) -> dict[str, Any]:
    """That of the step that the run has come to, from the end of its metrics; {} if it has none there."""
    path = folder / METRICS
    if not path.is_file():
        return {}
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = [line for line in map(_parsed, file) if line and line.get("run") == run]
    return max(lines, key=lambda line: line["step"], default={})


def last_step(folder: Path, run: str) -> int:
    """0 without any."""
    return last_line(folder, run).get("step", 0)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def forget_events(folder: Path, run: str) -> None:
    """Of a run that begins anew. For the driver, before it does."""
    path = folder / EVENTS
    if path.is_file():
        left = [line for line in path.read_bytes().splitlines() if (_parsed(line) or {}).get("run", run) != run]
        path.write_bytes(b"".join(line + b"\n" for line in left))


def bad_steps(folder: Path, run: str) -> dict[int, str]:
    """The steps that a run went back from, and why."""
    return {e["step"]: e["reason"] for e in read_lines(folder / EVENTS, run) if e["event"] == BAD_STEP}


class Account:
    """Adds to the lines of a run:

    goodput      time in steps that count, over the time since the run began while a driver was there
    restarts, lost_steps   since the run began: how often workers went on after others, and steps that were done again
    recovery     in the first line after a restart: its ``cause``, ``lost_steps``, ``seconds`` from the stop to the end
                 of this step, and of these ``scheduling_s`` until workers were asked for, ``process_s`` until they
                 ran, ``import_s``, ``restore_s`` and ``first_step_s``, and whether rank 0 had waited in ``standby``. It
                 is an event too: where a run goes back once more, the line goes.
    """

    def __init__(self, folder: Path, run: str, done: int):
        """``done``: steps of the state that the run goes on from. To be made before the lines of later steps go."""
        events = list(read_lines(folder / EVENTS, run))
        lines = list(read_lines(folder / METRICS, run))
        recent = events[max((n for n, e in enumerate(events) if e["event"] == RESUME), default=0) :]
        self._stopped = next((e for e in reversed(recent) if e["event"] in (STOP, DRIVER)), None)
        reached = max(
            [line["step"] for line in lines] + [e.get("reached", 0) for e in recent if e["event"] == DRIVER] + [0]
        )
        starts = [e["time"] for e in events if e["event"] == START] or [time.time()]
        self._began, self._start = starts[0], starts[-1]
        self._restarts = sum(e["event"] == RESUME for e in events)
        self._lost = max(0, reached - done)
        self._lost_in_all = self._lost + sum(e["lost_steps"] for e in events if e["event"] == RESUME)
        self._useful = sum(line.get("seconds", 0.0) for line in lines if line["step"] <= done)
        self._absent = _absent(events, lines)
        self._first, self._folder, self._run = True, folder, run
        write_event(folder, run, RESUME, step=done, lost_steps=self._lost)

    def line(self, seconds: float) -> dict[str, Any]:
        """For a finished step that took ``seconds``."""
        now = time.time()
        self._useful += seconds
        added: dict[str, Any] = {
            "goodput": round(min(1.0, self._useful / max(now - self._began - self._absent, 1e-9)), 4),
            "restarts": self._restarts,
            "lost_steps": self._lost_in_all,
        }
        if self._first and self._restarts:
            added["recovery"] = self._recovery(now)
            write_event(self._folder, self._run, RECOVERED, **added["recovery"])
        self._first = False
        return added

    def _recovery(self, now: float) -> dict[str, Any]:
        stop = self._stopped["time"] if self._stopped is not None else self._start
        times = [stop, self._start, *(_marks.get(name, now) for name in ("entered", "imported", "restored")), now]
        names = ("scheduling_s", "process_s", "import_s", "restore_s", "first_step_s")
        return {
            "cause": DRIVER if self._stopped is None else self._stopped.get("cause", DRIVER),
            "lost_steps": self._lost,
            "seconds": round(now - stop, 3),
            **{name: round(b - a, 3) for name, a, b in zip(names, times, times[1:], strict=False)},
            "standby": _marks.get("waiting", now) < self._start,
        }


def _absent(events: list[dict[str, Any]], lines: list[dict[str, Any]]) -> float:
    """Seconds before a driver began, since anything was heard of the one before it."""
    heard = sorted([(line["time"], "") for line in lines if "time" in line] + [(e["time"], e["event"]) for e in events])
    return sum(b - a for (a, _), (b, event) in zip(heard, heard[1:], strict=False) if event == DRIVER)
