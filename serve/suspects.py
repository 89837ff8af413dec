"""Inputs that were being worked on when a replica died.

Whatever was in the replica is suspected, most of it wrongly. A suspect is tried alone the next time: if the replica
dies again it was the input, which is refused from then on; if not, it is cleared.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

MAX_ENTRIES = 4096
REMEMBERED_S = 3600.0


class Suspects:
    """By key (a content hash), for an hour, the oldest forgotten first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._convicted: OrderedDict[str, tuple[float, bool]] = OrderedDict()

    def is_suspect(self, key: str) -> bool:
        return self._get(key) is not None

    def is_refused(self, key: str) -> bool:
        return self._get(key) is True

    def crashed(self, key: str, alone: bool) -> None:
        """A replica died with this input in it; ``alone``: and no other."""
        self._convicted[key] = (self._clock(), alone or self.is_refused(key))
        self._convicted.move_to_end(key)
        while len(self._convicted) > MAX_ENTRIES:
            self._convicted.popitem(last=False)

    def clear(self, key: str) -> None:
        """The input was tried alone, and no replica died."""
        self._convicted.pop(key, None)

    def _get(self, key: str) -> bool | None:
        at, refused = self._convicted.get(key, (0.0, None))
        if refused is not None and self._clock() - at > REMEMBERED_S:
            del self._convicted[key]
            return None
        return refused


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
