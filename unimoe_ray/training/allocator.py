"""Memory that training frees and asks for again at every step stays in the process."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed. Where it is glibc; tells whether.

    By default it gives the gradients of a step back to the system, and the next step's fault them in again, page by
    page: up to a third of the time of a mixture with few tokens per expert. The process stays as large as its peak.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    kept = mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    # Older versions refuse more than 32 MiB.
    return bool(kept and (mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_THRESHOLD, 2**25)))
