"""Who waits for whom where there are fewer cores than threads that would run."""

from __future__ import annotations

import os
from contextlib import suppress


def give_way(but: int | None = None) -> None:
    """Threads of this process, and those that they will start, no longer interrupt a thread that computes: woken by a
    message, they take a free core, or wait until the other's slice is over (some 3 ms). An engine on two cores lost a
    twentieth of its time to them. ``but``: native id of a thread that stays as it is. Without effect where the system
    is not Linux or does not allow it."""
    if not hasattr(os, "SCHED_BATCH"):
        return
    for thread in os.listdir("/proc/self/task"):
        if int(thread) != but:
            with suppress(OSError):
                os.sched_setscheduler(int(thread), os.SCHED_BATCH, os.sched_param(0))
