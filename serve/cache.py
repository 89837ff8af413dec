"""Soft tokens of media that came before, by content: references into the object store, bounded in bytes, and of small
ones the arrays too."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

Response = TypeVar("Response")
# Sizes are known only once the language model has read the value; until then the number of entries is the bound.
MAX_ENTRIES = 4096


@dataclass
class _Entry(Generic[Response]):
    response: Response
    nbytes: int = 0
    value: np.ndarray | None = None


class EmbeddingCache(Generic[Response]):
    """Least recently used first out. An entry may still be under way: whoever asks meanwhile shares it."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._entries: OrderedDict[str, _Entry[Response]] = OrderedDict()

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
            self._remove(key)
            self._entries[key] = _Entry(response)
            self._trim()

    def measured(self, key: str, nbytes: int) -> None:
        """Set the size of an entry, if it is still there."""
        entry = self._entries.get(key)
        if entry is not None:
            self.nbytes += nbytes - entry.nbytes
            entry.nbytes = nbytes
            self._trim()

    def size(self, key: str) -> int | None:
        """Bytes of an entry; None if it is not there or not measured yet."""
        entry = self._entries.get(key)
        return entry.nbytes or None if entry is not None else None

    def value(self, key: str) -> np.ndarray | None:
        """The array of an entry, if it was read and kept."""
        entry = self._entries.get(key)
        return entry.value if entry is not None else None

    def keep(self, key: str, response: Response, value: np.ndarray) -> None:
        """Note the array of an entry, unless another took its place. It lies in the object store's memory, which the
        entry holds anyway."""
        entry = self._entries.get(key)
        if entry is not None and entry.response is response:
            entry.value = value

    def drop(self, key: str, response: Response) -> None:
        """Forget an entry whose value is lost, unless another took its place."""
        entry = self._entries.get(key)
        if entry is not None and entry.response is response:
            self._remove(key)

    def _trim(self) -> None:
        while self._entries and (len(self._entries) > MAX_ENTRIES or self.nbytes > self.max_bytes):
            self._remove(next(iter(self._entries)))

    def _remove(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        self.nbytes -= entry.nbytes if entry is not None else 0
