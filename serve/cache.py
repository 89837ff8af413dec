"""Soft tokens of media that came before, by content: references into the object store, bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

Response = TypeVar("Response")
# Sizes are known only once the language model has read the value; until then the number of entries is the bound.
MAX_ENTRIES = 4096


@dataclass
class _Entry(Generic[Response]):
    response: Response
    nbytes: int = 0


class EmbeddingCache(Generic[Response]):
    """Least recently used first out. An entry may still be under way: whoever asks meanwhile shares it."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self._entries: OrderedDict[str, _Entry[Response]] = OrderedDict()

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> Response | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry.response

    def put(self, key: str, response: Response) -> None:
        if self.max_bytes:
            self._entries[key] = _Entry(response)
            self._trim()

    def measured(self, key: str, nbytes: int) -> None:
        """Set the size of an entry, if it is still there."""
        if key in self._entries:
            self._entries[key].nbytes = nbytes
            self._trim()

    def size(self, key: str) -> int | None:
        """Bytes of an entry; None if it is not there or not measured yet."""
        entry = self._entries.get(key)
        return entry.nbytes or None if entry is not None else None

    def drop(self, key: str, response: Response) -> None:
        """Forget an entry whose value is lost, unless another took its place."""
        entry = self._entries.get(key)
        if entry is not None and entry.response is response:
            del self._entries[key]

    def _trim(self) -> None:
        while self._entries and (len(self._entries) > MAX_ENTRIES or self.nbytes > self.max_bytes):
            self._entries.popitem(last=False)
