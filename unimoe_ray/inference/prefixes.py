"""Prompts that begin alike: keys and values of the common part are copied, not computed again."""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from unimoe_ray.inference.kv_cache import Extent

# Shorter common parts (a chat template's first words) are not worth looking for.
SHORTEST = 16
# Nobody who does not know this can make two files of one hash, and so read or spoil what another request left.
_SECRET = secrets.token_bytes(32)


def content_keys(values: np.ndarray) -> np.ndarray:
    """Keys [M] int64 of a file's soft tokens [M, H]: negative, equal only for the same row of the same content."""
    about = f"{values.shape}{values.dtype}".encode()
    digest = hashlib.blake2b(np.ascontiguousarray(values).data, key=_SECRET, salt=b"soft", digest_size=16)
    digest.update(about)
    words = np.frombuffer(digest.digest(), np.uint64)
    with np.errstate(over="ignore"):
        rows = (np.arange(len(values), dtype=np.uint64) + words[0]) * (words[1] | np.uint64(1))
    return (rows | np.uint64(1 << 63)).view(np.int64)


@dataclass(eq=False)
class Prefix:
    """What is in the cache of one sequence. keys [n] int64: what each token is (its id, or that of ``content_keys``);
    experts [n, L, K]: where it was routed."""

    keys: np.ndarray
    experts: np.ndarray
    extent: Extent

    def common(self, keys: np.ndarray) -> int:
        """Tokens that both begin with."""
        n = min(len(self.keys), len(keys))
        differ = np.flatnonzero(self.keys[:n] != keys[:n])
        return int(differ[0]) if len(differ) else n


class PrefixCache:
    """Prefixes of sequences that have left, the one unused for longest first to go."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, Prefix] = OrderedDict()
        self._beginnings: dict[bytes, set[int]] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, prefix: Prefix) -> None:
        """Of at least ``SHORTEST`` tokens."""
        self._kept[self._next] = prefix
        self._beginnings.setdefault(_beginning(prefix.keys), set()).add(self._next)
        self._next += 1

    def find(self, keys: np.ndarray) -> tuple[int, Prefix] | None:
        """Length of the longest common beginning, if it is worth it, and which prefix has it."""
        names = self._beginnings.get(_beginning(keys), ()) if len(keys) >= SHORTEST else ()
        length, name = max(((self._kept[name].common(keys), name) for name in names), default=(0, -1))
        if length < SHORTEST:
            return None
        self._kept.move_to_end(name)
        return length, self._kept[name]

    def drop_oldest(self) -> Extent:
        name, prefix = self._kept.popitem(last=False)
        beginning = _beginning(prefix.keys)
        self._beginnings[beginning].discard(name)
        if not self._beginnings[beginning]:
            del self._beginnings[beginning]
        return prefix.extent


def _beginning(keys: np.ndarray) -> bytes:
    return keys[:SHORTEST].tobytes()
