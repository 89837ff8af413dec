"""Random orders that need no list of what they order: any place of any epoch is computed by itself.

Time and memory of a look-up are those of the places asked for, whatever the size of the pool.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from math import isqrt

import numpy as np

# Pools up to this size are shuffled as a whole, an epoch at a time: two MiB.
SHUFFLED = 2**18
_ROUNDS = 8


def stream(name: str, size: int, start: int, stop: int, seed: int) -> np.ndarray:
    """Places ``start`` to ``stop`` of an endless row of epochs over range(``size``), each in an order of its own:
    int64 [stop - start]. ``name`` and ``seed`` decide the orders."""
    places = np.arange(start, stop)
    epochs, within = np.divmod(places, size)
    if start // size == max(start, stop - 1) // size:
        return _ordered(name, size, start // size, within, seed)
    return np.concatenate([_ordered(name, size, int(e), within[epochs == e], seed) for e in np.unique(epochs)])


def _ordered(name: str, size: int, epoch: int, places: np.ndarray, seed: int) -> np.ndarray:
    if size <= SHUFFLED:
        return _shuffled(name, size, epoch, seed)[places]
    return permute(places, size, _round_keys(name, epoch, seed))


@lru_cache(maxsize=64)
def _shuffled(name: str, size: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, _number(name), epoch]).permutation(size)


@lru_cache(maxsize=64)
def _round_keys(name: str, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, _number(name), epoch]).integers(2**64, size=_ROUNDS, dtype=np.uint64)


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def permute(places: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where a pseudo-random permutation of range(``size``) sends ``places``: int64 of the same shape.

    A Feistel network over pairs (left, right) of numbers below about sqrt(size), with cycle walking: what lands at or
    above ``size`` goes through it again (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    keys [rounds] uint64, an even number of them
    """
    a = np.uint64(isqrt(size - 1) + 1)
    b = np.uint64(-(-size // int(a)))
    values = places.astype(np.uint64)
    outside = np.ones(values.shape, bool)
    while outside.any():
        values[outside] = _feistel(values[outside], a, b, keys)
        outside = values >= size
    return values.astype(np.int64)


def _feistel(values: np.ndarray, a: np.uint64, b: np.uint64, keys: np.ndarray) -> np.ndarray:
    """A bijection of range(a * b)."""
    left, right = np.divmod(values, b)
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        left = (left + _mixed(right ^ first)) % a
        right = (right + _mixed(left ^ second)) % b
    return left * b + right


def _mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, shortened to 32 bits so that sums cannot overflow."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x >> np.uint64(32)
