"""Threads that give way to the engine, in a process of their own: they can't be told otherwise again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, threading
from serve.priority import give_way

done = threading.Event()
engine, other = (threading.Thread(target=done.wait, daemon=True) for _ in range(2))
engine.start()
other.start()
give_way(but=engine.native_id)
later = threading.Thread(target=done.wait, daemon=True)
later.start()
for id in (0, engine.native_id, other.native_id, later.native_id):
    print(os.sched_getscheduler(id))
"""


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux only")
def test_all_threads_but_one_give_way_and_so_do_later_ones():
    said = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True)
    assert [int(policy) for policy in said.stdout.split()] == [
        os.SCHED_BATCH,
        os.SCHED_OTHER,
        os.SCHED_BATCH,
        os.SCHED_BATCH,
    ]
