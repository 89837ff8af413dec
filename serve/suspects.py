"""Inputs that were being worked on when a replica died.

Whatever was in the replica is suspected, most of it wrongly. A suspect is tried alone the next time: if no replica
dies it is cleared. Replicas end for reasons of their own as well, so a trial whose replica dies is held once more: the
second such death was the input's, which is refused from then on.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

MAX_ENTRIES = 4096
REMEMBERED_S = 3600.0
CONVICTING_DEATHS = 2


class Suspects:
    """By key (a content hash), for an hour, the oldest forgotten first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        # When the last replica died with it, and how many have with it alone in them.
        self._deaths: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def is_suspect(self, key: str) -> bool:
        return self._alone(key) is not None

    def is_refused(self, key: str) -> bool:
        return (self._alone(key) or 0) >= CONVICTING_DEATHS

    def crashed(self, key: str, alone: bool) -> None:
        """A replica died with this input in it; ``alone``: and no other."""
        self._deaths[key] = (self._clock(), (self._alone(key) or 0) + alone)
        self._deaths.move_to_end(key)
        while len(self._deaths) > MAX_ENTRIES:
            self._deaths.popitem(last=False)

    def clear(self, key: str) -> None:
        """The input was tried alone, and no replica died."""
        self._deaths.pop(key, None)

    def _alone(self, key: str) -> int | None:
        at, alone = self._deaths.get(key, (0.0, None))
        if alone is not None and self._clock() - at > REMEMBERED_S:
            del self._deaths[key]
            return None
        return alone


class Gate:
    """Many at a time, or one alone, who waits until the others have left and keeps new ones out."""

    def __init__(self) -> None:
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()
        self._alone = asyncio.Lock()

    @asynccontextmanager
    async def enter(self, alone: bool) -> AsyncIterator[None]:
        if alone:
            async with self._alone:
                await self._empty.wait()
                yield
            return
        async with self._alone:
            self._inside += 1
            self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()
