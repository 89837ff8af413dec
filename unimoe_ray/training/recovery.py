"""What failures cost a run: restarts, steps done again, time until the next new step, and goodput.

``events.jsonl`` of the run folder has a line for each start of workers, failure and bad step, written where it is
noticed; from it and the steps in ``metrics.jsonl``, rank 0 gets what it adds to the lines of the steps.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
# Events: the driver began; workers are being started; workers stopped, planned or not; a step was bad.
DRIVER, START, STOP, BAD_STEP = "driver", "start", "stop", "bad_step"
TAIL_BYTES = 1 << 16

_marks: dict[str, float] = {}


def mark(name: str) -> None:
    """This process has come to ``name``, one of ``entered``, ``imported``, ``restored``."""
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


def last_step(folder: Path, run: str) -> int:
    """The step that the run has come to, from the end of its metrics; 0 if it has none there."""
    path = folder / METRICS
    if not path.is_file():
        return 0
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = [_parsed(line) for line in file]
    return max((line.get("step", 0) for line in lines if line and line.get("run") == run), default=0)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


@dataclass
class History:
    """One run so far. lines: its steps, without those that were done again, of which there are ``again``."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    again: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path, run: str) -> History:
        history = cls(events=list(read_lines(folder / EVENTS, run)))
        for line in read_lines(folder / METRICS, run):
            history._go_back(line["step"])
            history.lines.append(line)
        return history

    def _go_back(self, step: int) -> None:
        while self.lines and self.lines[-1]["step"] >= step:
            self.lines.pop()
            self.again += 1

    def bad_steps(self) -> dict[int, str]:
        """The steps that a run went back from, and why."""
        return {e["step"]: e["reason"] for e in self.events if e["event"] == BAD_STEP}


class Account:
    """Adds to the lines of a run, in each attempt (the steps between two starts of its workers):

    attempt      how many there were before
    goodput      time in steps that count, over the time since the run began while a driver was there
    restarts, lost_steps   since the run began: starts after the first, and steps done again
    recovery     in the first line after a restart: its ``cause``, ``lost_steps``, ``seconds`` from the stop to the end
                 of this step, and of these ``scheduling_s`` until workers were asked for, ``process_s`` until they
                 ran, ``import_s``, ``restore_s`` and ``first_step_s``
    """

    def __init__(self, folder: Path, run: str, resumed: int):
        """``resumed``: steps that are done, from the restored state."""
        history = History.read(folder, run)
        before = len(history.lines)
        history._go_back(resumed + 1)
        self.earlier = history.lines
        self._lost = before - len(history.lines)
        self._lost_before = history.again
        self._useful = sum(line.get("seconds", 0.0) for line in history.lines)
        starts = [event["time"] for event in history.events if event["event"] == START]
        stops = [event for event in history.events if event["event"] == STOP]
        self._attempt = max(0, len(starts) - 1)
        self._began = starts[0] if starts else time.time()
        self._stop = stops[-1] if stops and (len(starts) < 2 or stops[-1]["time"] >= starts[-2]) else None
        self._start = starts[-1] if starts else self._began
        times = sorted(
            [(line["time"], None) for line in read_lines(folder / METRICS, run) if "time" in line]
            + [(event["time"], event["event"]) for event in history.events]
        )
        absent = [b - a for (a, _), (b, event) in zip(times, times[1:], strict=False) if event == DRIVER]
        self._absent = sum(absent)
        self._driver = next((b for b, event in reversed(times) if event == DRIVER), None)
        self._first = True

    def line(self, seconds: float) -> dict[str, Any]:
        """For a finished step that took ``seconds``."""
        now = time.time()
        self._useful += seconds
        added: dict[str, Any] = {
            "attempt": self._attempt,
            "goodput": round(min(1.0, self._useful / max(now - self._began - self._absent, 1e-9)), 4),
            "restarts": self._attempt,
            "lost_steps": self._lost_before + self._lost,
        }
        if self._first and self._attempt:
            added["recovery"] = self._recovery(now)
        self._first = False
        return added

    def _recovery(self, now: float) -> dict[str, Any]:
        stop = self._stop["time"] if self._stop is not None else self._driver or self._start
        times = [stop, self._start, *(_marks.get(name, now) for name in ("entered", "imported", "restored")), now]
        names = ("scheduling_s", "process_s", "import_s", "restore_s", "first_step_s")
        return {
            "cause": self._stop["cause"] if self._stop is not None else "driver",
            "lost_steps": self._lost,
            "seconds": round(now - stop, 3),
            **{name: round(b - a, 3) for name, a, b in zip(names, times, times[1:], strict=False)},
        }
