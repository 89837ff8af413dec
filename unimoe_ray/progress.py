"""The live display of a run, and the reader of its growing metrics file."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.table import Column
from rich.text import Text

PLAIN_INTERVAL_S = 10.0
RATE_WINDOW_S = 60.0


class TrainProgress:
    """One line per running job with step, loss, tokens/s, a bar and the time left; a context manager.

    On a terminal the lines stay at the bottom while ordinary prints scroll above them. Elsewhere (CI, ``ray job
    submit``) a plain line is printed for the first and the last step of each run and at most every
    ``plain_interval_s`` seconds between them. Safe to call from several threads.
    """

    def __init__(self, console: Console | None = None, plain_interval_s: float = PLAIN_INTERVAL_S):
        self.console = console or Console()
        self.plain_interval_s = plain_interval_s
        self._rows: dict[str, _Row] = {}
        self._lock = threading.Lock()
        self._live: Progress | None = None

    def __enter__(self) -> TrainProgress:
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            columns = (
                TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=14)),
                BarColumn(bar_width=24),
                _Facts(table_column=Column(no_wrap=True)),
            )
            self._live = Progress(*columns, console=self.console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, run: str, metrics: dict[str, Any], total: int) -> None:
        """A finished step of ``run``: ``metrics`` as in metrics.jsonl (step, loss, tokens_per_s), ``total`` steps."""
        self._show(run, int(metrics["step"]), total, metrics.get("loss"), metrics.get("tokens_per_s"))

    def count(self, what: str, done: int, total: int | None) -> None:
        """Progress of anything that is counted, with its rate: ``done`` of ``total``, None while that is not known. The
        line ends by itself at ``total``."""
        self._show(what, done, total or 0, None, None)
        if total is not None and done >= total:
            self.done(what)

    def message(self, text: str) -> None:
        """A line of text above the display."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def done(self, run: str) -> None:
        """``run`` has finished: its line stays, with the time that it took."""
        with self._lock:
            row = self._rows.pop(run, None)
            if row is None:
                return
            row.finished = True
            if self._live is not None:
                self._live.stop_task(row.task)
                self._live.remove_task(row.task)
                self._live.console.print(row.line(run), markup=False, highlight=False, soft_wrap=True)
            elif row.printed_step != row.step:
                self._print(run, row)

    def _show(self, run: str, step: int, total: int, loss: float | None, tokens_per_s: float | None) -> None:
        with self._lock:
            row = self._rows.get(run)
            first = row is None or step < row.step
            if row is None:
                row = self._rows[run] = _Row()
                if self._live is not None:
                    row.task = self._live.add_task(escape(run), total=total or None, row=row)
            row.advance(step, total, loss, tokens_per_s)
            if self._live is not None:
                self._live.update(row.task, completed=step, total=total or None)
            elif first or 0 < total <= step or time.monotonic() - row.printed_at >= self.plain_interval_s:
                self._print(run, row)

    def _print(self, run: str, row: _Row) -> None:
        self.console.print(row.line(run), markup=False, highlight=False, soft_wrap=True)
        row.printed_at, row.printed_step = time.monotonic(), row.step


@dataclass
class _Row:
    step: int = 0
    total: int = 0
    loss: float | None = None
    tokens_per_s: float | None = None
    task: Any = None
    finished: bool = False
    printed_at: float = 0.0
    printed_step: int = -1
    started: float = field(default_factory=time.monotonic)
    marks: list[tuple[float, int]] = field(default_factory=list)

    def advance(self, step: int, total: int, loss: float | None, tokens_per_s: float | None) -> None:
        if step < self.step:
            self.marks.clear()
        self.step, self.total = step, total
        self.loss = self.loss if loss is None else loss
        self.tokens_per_s = self.tokens_per_s if tokens_per_s is None else tokens_per_s
        now = time.monotonic()
        if not self.marks or now - self.marks[-1][0] >= 1.0:
            self.marks.append((now, step))
        while len(self.marks) > 2 and now - self.marks[0][0] > RATE_WINDOW_S:
            self.marks.pop(0)

    def rate(self) -> float | None:
        """Steps per second over the last minute; None until it is known."""
        if len(self.marks) < 2:
            return None
        (begun, first), *_, (until, last) = self.marks
        return (last - first) / (until - begun) if last > first else None

    def seconds_left(self) -> float | None:
        rate = self.rate()
        return (self.total - self.step) / rate if self.total and rate else None

    def facts(self) -> list[str]:
        """step, loss, tokens/s (of what is only counted: how many a second) and time, each of a fixed width so that
        lines stay aligned."""
        width = len(str(self.total))
        parts = [f"{self.step:>{width}}/{self.total}" if self.total else str(self.step)]
        if self.loss is not None:
            parts.append(f"loss {self.loss:7.4f}")
        if self.tokens_per_s is not None:
            parts.append(f"{_thousands(self.tokens_per_s):>6} tokens/s")
        elif self.loss is None and (rate := self.rate()) is not None:
            parts.append(f"{_thousands(rate) if rate >= 10 else f'{rate:.1f}':>5}/s")
        if self.finished or 0 < self.total <= self.step:
            parts.append(f"in {_clock(time.monotonic() - self.started)}")
        elif (left := self.seconds_left()) is not None:
            parts.append(f"{_clock(left)} left")
        return parts

    def line(self, run: str) -> str:
        percent = f"{100 * self.step // self.total:3d} %" if self.total else " " * 5
        return "  ".join([f"{run:<14}", percent, *self.facts()])


class _Facts(ProgressColumn):
    max_refresh = None

    def render(self, task: Any) -> Text:
        return Text("  ".join(task.fields["row"].facts()))


def follow_metrics(path: str | Path) -> Callable[[], list[dict[str, Any]]]:
    """A function whose every call returns the objects that were added to a JSON-lines file since the last call.

    The file need not exist yet; a half-written last line waits for its rest, a damaged line is left out, and a file
    that was replaced by a shorter one is read from its start.
    """
    path = Path(path)
    offset = 0

    def read() -> list[dict[str, Any]]:
        nonlocal offset
        try:
            with open(path, "rb") as file:
                if file.seek(0, 2) < offset:
                    offset = 0
                file.seek(offset)
                data = file.read()
        except FileNotFoundError:
            return []
        end = data.rfind(b"\n") + 1
        offset += end
        return [record for line in data[:end].splitlines() if (record := _parse(line)) is not None]

    return read


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _thousands(value: float) -> str:
    return f"{value:.0f}" if value < 1000 else f"{value / 1000:.1f}k"
