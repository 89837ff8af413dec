"""The progress line of a wait: in place on a terminal, else a line per change."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.status import Status

# The reasons take several requests.
REASONS_EVERY_S = 10.0
REPEAT_EVERY_S = 60.0


class Progress:
    """Shows what is waited for, its status, the time so far and the first reason why it is not ready.

    A context manager. Off a terminal a line is printed when it changes, and again every minute as a sign of life.
    """

    def __init__(self, console: Console, what: str, reasons_every_s: float = REASONS_EVERY_S):
        self.console, self.what, self.reasons_every_s = console, what, reasons_every_s
        self._started = time.monotonic()
        self._reasons_at = self._printed_at = float("-inf")
        self._reason = self._printed = ""
        self._live: Status | None = None

    def __enter__(self) -> Progress:
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = self.console.status(escape(self.what))
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def show(self, line: str, reasons: Callable[[], Sequence[Any]] = tuple) -> None:
        """``reasons`` is asked now and then; the first is shown."""
        now = time.monotonic()
        if now - self._reasons_at >= self.reasons_every_s:
            self._reasons_at = now
            found = reasons()
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            self._reason = str(found[0]).splitlines()[0] + more if found else ""
        text = f"{self.what}: {line}" + (f"; {self._reason}" if self._reason else "")
        if self._live is not None:
            self._live.update(escape(f"{text}  {now - self._started:.0f} s"))
        elif text != self._printed or now - self._printed_at >= REPEAT_EVERY_S:
            self._printed, self._printed_at = text, now
            self.print(f"{text}  ({now - self._started:.0f} s)")

    def print(self, text: str) -> None:
        """Above the line that is in place."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
