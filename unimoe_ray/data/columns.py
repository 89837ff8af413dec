"""Columns of mapped files, and the rows of one value in them, without a number in memory for every row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

# Rows that are counted together: finding one row of a value reads so many codes.
BLOCK = 4096


class Column:
    """One number per row, in pieces as they lie in the file; those of the rows asked for are read."""

    def __init__(self, pieces: Sequence[np.ndarray], dtype: type):
        self._pieces, self._dtype = pieces, dtype
        self._starts = np.cumsum([0, *map(len, pieces)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, rows: int | np.ndarray) -> np.ndarray:
        """The numbers of ``rows``, in their order."""
        rows = np.asarray(rows)
        numbers = np.empty(rows.shape, self._dtype)
        piece_of = np.searchsorted(self._starts, rows, side="right") - 1
        for piece in np.unique(piece_of):
            here = piece_of == piece
            numbers[here] = self._pieces[piece][rows[here] - self._starts[piece]]
        return numbers

    def __array__(self, dtype: type | None = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate([np.empty(0, self._dtype), *self._pieces], dtype=dtype or self._dtype, casting="unsafe")

    def rows_of(self, code: int) -> Rows:
        return Rows(self, code)

    def block(self, number: int) -> tuple[int, np.ndarray]:
        """First row and numbers of a block of up to ``BLOCK`` rows of one piece."""
        first, piece, offset = self._blocks[:, number].tolist()
        return first, self._pieces[piece][offset : offset + BLOCK]

    @cached_property
    def _blocks(self) -> np.ndarray:
        """First row, piece and offset in it, [3, blocks]."""
        offsets = [np.arange(0, len(piece), BLOCK) for piece in self._pieces] or [np.empty(0, np.int64)]
        pieces = np.repeat(np.arange(len(offsets)), [len(o) for o in offsets])
        offsets = np.concatenate(offsets)
        return np.stack([self._starts[pieces] + offsets, pieces, offsets])

    @cached_property
    def counts(self) -> np.ndarray:
        """Rows with each code before each block, and at last in all: [blocks + 1, codes] int64. Read once, in full."""
        codes = 1 + max((int(piece.max()) for piece in self._pieces if len(piece)), default=-1)
        counts = [np.zeros((1, codes), np.int64)]
        for piece in self._pieces:
            blocks = -(-len(piece) // BLOCK)
            place = np.repeat(np.arange(blocks) * codes, BLOCK)[: len(piece)] + piece
            counts.append(np.bincount(place, minlength=blocks * codes).reshape(blocks, codes))
        return np.concatenate(counts).cumsum(axis=0)


class Rows:
    """The rows of a column with one code, ascending; looked up by place when they are asked for."""

    def __init__(self, column: Column, code: int, first: int = 0, stop: int | None = None):
        self._column, self._code, self._first = column, code, first
        self._stop = int(column.counts[-1, code]) if stop is None else stop

    def __len__(self) -> int:
        return self._stop - self._first

    def __getitem__(self, places: int | slice | np.ndarray) -> int | Rows | np.ndarray:
        """Row numbers at ``places``; a slice of consecutive places gives ``Rows`` again."""
        if isinstance(places, slice):
            start, stop, _ = places.indices(len(self))
            return Rows(self._column, self._code, self._first + start, self._first + max(start, stop))
        if np.ndim(places) == 0:
            if not 0 <= places < len(self):
                raise IndexError(f"place {places} of {len(self)}")
            return int(self[np.array([places])][0])
        places = places + self._first
        before = self._column.counts[:, self._code]
        block_of = np.searchsorted(before, places, side="right") - 1
        rows = np.empty(places.shape, np.int64)
        for block in np.unique(block_of):
            here = block_of == block
            first, codes = self._column.block(block)
            rows[here] = first + np.flatnonzero(codes == self._code)[places[here] - before[block]]
        return rows

    def __iter__(self) -> Iterator[int]:
        return iter(np.asarray(self).tolist())

    def __array__(self, dtype: type | None = None, copy: bool | None = None) -> np.ndarray:
        return self[np.arange(len(self))].astype(dtype or np.int64)
