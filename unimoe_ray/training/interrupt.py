"""Workers that are asked to save and stop, because others come or go. Ray's own actors import this module: it must stay
light.

A request reaches any worker at any time; the workers agree on it with the first numbers that they exchange in a step,
and after that step all of them save and raise ``PlannedRestart``.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence

CAUSES = ("preemption", "resize")

_requested: str | None = None


class PlannedRestart(Exception):
    """Raised by all workers when the state has been saved: they are to be started anew, and no step is lost.

    cause: ``resize``, ``preemption``, ``rewind``
    """

    def __init__(self, cause: str, text: str):
        super().__init__(cause, text)
        self.cause, self.text = cause, text

    def __str__(self) -> str:
        return self.text


def request(cause: str) -> None:
    """Ask this process to save and stop after the step that it is in. Asking again changes nothing."""
    global _requested
    _requested = _requested or cause


def withdraw() -> None:
    """It could not be done."""
    global _requested
    _requested = None


def requested() -> list[int]:
    """1 for the cause for which this process was asked to stop, else 0, in the order of ``CAUSES``: to be summed up."""
    return [int(_requested == cause) for cause in CAUSES]


def agreed(requests: Sequence[int]) -> str | None:
    """The cause, from the sums over all workers."""
    return next((cause for cause, count in zip(CAUSES, requests, strict=True) if count), None)


def on_terminate() -> None:
    """From now on SIGTERM asks this process to save and stop, as a machine does that is about to be taken away. Called
    on the main thread."""
    signal.signal(signal.SIGTERM, lambda *_: request("preemption"))


def finish_writing(seconds: float) -> None:
    """Wait for the state that this process is writing (``checkpoint.saver``), but no longer than this."""
    deadline = time.monotonic() + seconds
    for thread in threading.enumerate():
        if thread.name.startswith("state-"):
            thread.join(max(0.0, deadline - time.monotonic()))


def training_stack() -> str | None:
    """Where the thread that trains in this process is now, as a traceback."""
    frames = sys._current_frames()
    for thread in threading.enumerate():
        if thread.name.startswith("TrainingThread(") and thread.ident in frames:
            stack = traceback.extract_stack(frames[thread.ident])
            ours = next((n for n, frame in enumerate(stack) if frame.name == "train_worker"), 0)
            return "".join(traceback.format_list(stack[ours:]))
    return None
