"""Files of a benchmark's folder: found by pattern, read as streams, with one-line errors that name what is missing."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unimoe_ray.data.records import Raw, read_json, read_jsonl
from unimoe_ray.errors import UsageError

_MAX_CELL = 2**27  # a base64 picture in a TSV


@dataclass(frozen=True)
class Folder:
    """``path`` has the questions; ``media`` the pictures, sounds and videos (the same folder, unless given)."""

    benchmark: str
    path: Path
    media: Path

    def one(self, *patterns: str) -> Path:
        """The file of the first pattern that has one. Raises UsageError: none, or several for one pattern."""
        for pattern in patterns:
            found = sorted(self.path.glob(pattern))
            if len(found) > 1:
                names = ", ".join(str(path.relative_to(self.path)) for path in found)
                raise UsageError(
                    f"{self.benchmark}: {self.path} has several files {pattern} ({names}); leave one there"
                )
            if found:
                return found[0]
        raise UsageError(f"{self.benchmark}: {self.path} has no file {' or '.join(patterns)}")

    def many(self, *patterns: str) -> list[Path]:
        """All files of the first pattern that has some. Raises UsageError for none."""
        for pattern in patterns:
            if found := sorted(self.path.glob(pattern)):
                return found
        raise UsageError(f"{self.benchmark}: {self.path} has no file {' or '.join(patterns)}")

    def maybe(self, pattern: str) -> Path | None:
        return next(iter(sorted(self.path.glob(pattern))), None)

    def media_in(self, *folders: str) -> Callable[[str], str]:
        """Names of media files to paths, in the first of these folders that is there, else in the media folder itself.
        Whether a file is there shows when it is opened."""
        root = next((self.media / name for name in folders if (self.media / name).is_dir()), self.media)
        return lambda name: str(root / name)


@dataclass(frozen=True)
class Entry:
    """A record and its place; ``entry["key"]`` raises UsageError if it has no such key."""

    file: Path
    where: str
    values: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        if key not in self.values:
            raise UsageError(f"{self.file}, {self.where}: has no '{key}' (it has {', '.join(map(str, self.values))})")
        return self.values[key]

    def text(self, key: str) -> str:
        value = self[key]
        if not isinstance(value, str):
            raise UsageError(f"{self.file}, {self.where}: '{key}' is not text but {type(value).__name__}")
        return value

    def number(self, key: str) -> int:
        value = self[key]
        try:
            return int(value)
        except (TypeError, ValueError):
            raise UsageError(f"{self.file}, {self.where}: '{key}' is {value!r}, not a whole number") from None

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts; a text is a list of one."""
        value = self[key]
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(entry, str) for entry in values):
            raise UsageError(f"{self.file}, {self.where}: '{key}' is not a list of texts")
        return tuple(values)


def json_list(file: Path, key: str | None = None) -> Iterator[Entry]:
    """The objects of a JSON list, or of the list that the file's object has under ``key``."""
    return _entries(file, read_json(str(file), key))


def json_lines(file: Path) -> Iterator[Entry]:
    return _entries(file, read_jsonl(str(file)))


def json_object(file: Path) -> Iterator[tuple[str, Entry]]:
    """The objects that a small file's JSON object has, by their keys."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(found, dict) or not all(isinstance(value, dict) for value in found.values()):
        raise UsageError(f"{file}: must hold a JSON object of objects")
    for key, value in found.items():
        yield key, Entry(file, key, value)


def table(file: Path, delimiter: str = ",") -> Iterator[Entry]:
    """The rows of a CSV or TSV file with a header. Raises UsageError for a row of another length."""
    csv.field_size_limit(_MAX_CELL)
    with open(file, encoding="utf-8-sig", newline="") as lines:
        rows = csv.reader(lines, delimiter=delimiter)
        try:
            header = next(rows, None)
            if header is None:
                raise UsageError(f"{file}: is empty")
            for number, row in enumerate(rows, start=2):
                if not row:
                    continue
                if len(row) != len(header):
                    raise UsageError(f"{file}, row {number}: {len(row)} columns, but the header has {len(header)}")
                yield Entry(file, f"row {number}", dict(zip(header, row, strict=True)))
        except (csv.Error, UnicodeDecodeError) as error:
            raise UsageError(f"{file}: not a table that can be read ({error})") from None


def joined(first: Iterator[Entry], second: Iterator[Entry], key: str) -> Iterator[tuple[Entry, Entry]]:
    """Entries of the first with those of the second that have the same ``key``. Of two files in the same order, as the
    published ones are, one entry is held at a time; else those that were read too early. Raises UsageError for an
    entry without partner."""
    early: dict[Any, Entry] = {}
    for entry in first:
        wanted = entry[key]
        while wanted not in early:
            other = next(second, None)
            if other is None:
                raise UsageError(f"{entry.file}, {entry.where}: {key} {wanted!r} is not in the other file")
            early[other[key]] = other
        yield entry, early.pop(wanted)


def _entries(file: Path, raws: Iterator[Raw]) -> Iterator[Entry]:
    for raw in raws:
        if raw.fault is not None or not isinstance(raw.record, dict):
            raise UsageError(f"{file}, {raw.where}: {raw.fault or 'is not a JSON object'}")
        yield Entry(file, raw.where, raw.record)
