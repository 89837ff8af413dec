"""What ``prepare`` has read, on disk: samples, media and what is wrong, so that memory does not grow with them."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from unimoe_ray.data.locations import BadMedia, content_key
from unimoe_ray.data.schema import BadSample, Kind, Media, Sample
from unimoe_ray.data.sources import BadRecord, Placed

# Journals would be of use after a crash only, and then all is read again.
_SCHEMA = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA cache_size = -16384;
CREATE TABLE ids (split TEXT, id TEXT, uses INTEGER, PRIMARY KEY (split, id)) WITHOUT ROWID;
CREATE TABLE keys (paths BLOB PRIMARY KEY, key TEXT, fault TEXT) WITHOUT ROWID;
CREATE TABLE media (
    number INTEGER PRIMARY KEY, name TEXT UNIQUE, paths TEXT, held_out INTEGER, tokens INTEGER, fault TEXT
);
CREATE TABLE samples (
    number INTEGER PRIMARY KEY, split TEXT, source INTEGER, written TEXT, content BLOB, value TEXT,
    UNIQUE (content, split, written, number)
);
CREATE TABLE bad (number INTEGER PRIMARY KEY, split TEXT, file TEXT, place TEXT, id TEXT, reason TEXT);
BEGIN;
"""
PAGE = 1000
HASHERS = 8  # threads that read media; most of it, and SHA-256, is outside of Python's lock
UNMARKED = "tokens IS NULL AND fault IS NULL"
NOT_HELD_OUT = "NOT held_out"


def of_kind(kind: Kind) -> str:
    """A condition on media."""
    return f"name GLOB '{kind}/*'"


@dataclass(frozen=True)
class Entry:
    """A sample with its media's names ``<kind>/<content key>`` in the order of the placeholders."""

    placed: Placed
    names: list[str]


@dataclass(frozen=True)
class Repeat:
    """Samples of the same conversation about the same media: how many, and the first two of them."""

    count: int
    first: tuple[str, str]
    second: tuple[str, str]


class Catalog:
    """A scratch database; a context manager that removes its file in the end."""

    def __init__(self, path: Path, max_bytes: int):
        self.path, self.max_bytes = path, max_bytes
        self._hashing: dict[bytes, Future[str]] = {}

    def __enter__(self) -> Catalog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        self.db = sqlite3.connect(self.path, isolation_level=None)
        self.db.executescript(_SCHEMA)
        self._hashers = ThreadPoolExecutor(HASHERS)
        return self

    def __exit__(self, *_: object) -> None:
        self._hashers.shutdown(cancel_futures=True)
        self.db.close()
        self.path.unlink(missing_ok=True)

    def begin(self, sample: Sample) -> None:
        """Begin to read the media of a sample that will be added."""
        for item in sample.media:
            which = _digest(item.paths)
            if which not in self._hashing and self._one("SELECT 1 FROM keys WHERE paths = ?", (which,)) is None:
                self._hashing[which] = self._hashers.submit(content_key, item.paths, self.max_bytes)

    def add(self, split: str, placed: Placed) -> None:
        """Keep a sample. Raises BadMedia for a file that can't be read, BadSample for a record that is there already.

        An id that comes again with another content (LLaVA's own data have such) gets a number: ``7``, ``7~2``.
        """
        sample = placed.sample
        try:
            names = [f"{item.kind}/{self._key(item.paths)}" for item in sample.media]
        except BadMedia:
            for item in sample.media:
                self._hashing.pop(_digest(item.paths), None)
            raise
        content = _digest([sample.turns, names])
        repeated = (content, split, sample.id)
        if self._one("SELECT 1 FROM samples WHERE content = ? AND split = ? AND written = ?", repeated):
            raise BadSample(f"id '{sample.id}' occurs twice, with the same content")
        unique = self._free_id(split, sample.id)
        items = [[item.kind, item.paths, name] for item, name in zip(sample.media, names, strict=True)]
        value = json.dumps([unique, sample.task, sample.turns, items, placed.file, placed.where])
        self.db.execute(
            "INSERT INTO samples (split, source, written, content, value) VALUES (?, ?, ?, ?, ?)",
            (split, placed.source, sample.id, content, value),
        )
        for item, name in zip(sample.media, names, strict=True):
            self.db.execute(
                "INSERT INTO media (name, paths, held_out) VALUES (?, ?, ?) "
                "ON CONFLICT DO UPDATE SET held_out = MAX(held_out, excluded.held_out)",
                (name, json.dumps(item.paths), split != "train"),
            )

    def add_bad(self, split: str, bad: BadRecord) -> None:
        # A record may hold characters that no file takes.
        row = [text.encode("utf-8", "backslashreplace").decode() for text in (bad.file, bad.where, bad.id, bad.reason)]
        self.db.execute("INSERT INTO bad (split, file, place, id, reason) VALUES (?, ?, ?, ?, ?)", (split, *row))

    def samples(self, split: str) -> Iterator[Entry]:
        """In the order in which they were added."""
        rows = self.db.execute("SELECT source, value FROM samples WHERE split = ? ORDER BY number", (split,))
        for source, value in rows:
            id, task, turns, items, file, where = json.loads(value)
            media = tuple(Media(kind, tuple(paths)) for kind, paths, _ in items)
            sample = Sample(id, task, tuple((q, a) for q, a in turns), media, {})
            yield Entry(Placed(sample, file, where, source), [name for *_, name in items])

    def media(self, page: int = PAGE) -> Iterator[dict[str, Media]]:
        """Every media file once, by name, some at a time, in the order of their first use."""
        rows = self.db.execute("SELECT name, paths FROM media ORDER BY number")
        while part := rows.fetchmany(page):
            yield {name: Media(name.partition("/")[0], tuple(json.loads(paths))) for name, paths in part}

    def mark(self, name: str, tokens: int | None, fault: str | None) -> None:
        """How many soft tokens a media file becomes, or why it can't be used."""
        self.db.execute("UPDATE media SET tokens = ?, fault = ? WHERE name = ?", (tokens, fault, name))

    def tokens(self, name: str) -> int:
        """As marked."""
        return self._one("SELECT tokens FROM media WHERE name = ?", (name,))[0]

    def fault(self, names: list[str]) -> str | None:
        """The reason of the first of these media that has one."""
        found = (self._one("SELECT fault FROM media WHERE name = ?", (name,)) for name in names)
        return next((fault for (fault,) in found if fault), None)

    def bad(self) -> Iterator[dict[str, str]]:
        """Quarantine entries."""
        for split, file, place, id, reason in self.db.execute(
            "SELECT split, file, place, id, reason FROM bad ORDER BY number"
        ):
            yield {"split": split, "id": id, "reason": reason, "file": file, "where": place}

    def find(self, kind: str, which: str = "TRUE", page: int = PAGE) -> Iterator[list[tuple[str, list[str]]]]:
        """Content key and paths of the media of one kind, some at a time, in the order of use. which: ``UNMARKED``,
        ``NOT_HELD_OUT``, both (AND)."""
        rows = self.db.execute(f"SELECT name, paths FROM media WHERE {which} AND {of_kind(kind)} ORDER BY number")
        while part := rows.fetchmany(page):
            yield [(name.partition("/")[2], json.loads(paths)) for name, paths in part]

    def places(self) -> Iterator[tuple[str, list[str]]]:
        """Name and paths of all sound media, sorted by name."""
        rows = self.db.execute("SELECT name, paths FROM media WHERE fault IS NULL ORDER BY name")
        return ((name, json.loads(paths)) for name, paths in rows)

    def some(self, kind: str, most: int) -> list[list[str]]:
        """Paths of a few media of one kind, from all over."""
        step = max(1, self.count("media", of_kind(kind)) // most)
        rows = self.db.execute(
            "SELECT paths FROM (SELECT paths, ROW_NUMBER() OVER (ORDER BY number) - 1 AS n FROM media "
            f"WHERE {of_kind(kind)}) WHERE n % ? = 0 LIMIT ?",
            (step, most),
        )
        return [json.loads(paths) for (paths,) in rows]

    def count(self, table: str, which: str = "TRUE") -> int:
        """Rows of ``samples``, ``media`` or ``bad``; those of media by a condition."""
        return self._one(f"SELECT COUNT(*) FROM {table} WHERE {which}", ())[0]

    def repeats(self, most: int) -> tuple[int, list[Repeat]]:
        """How many samples repeat an earlier one, in any split, and the most frequent of them."""
        repeated = "SELECT content, COUNT(*) n, MIN(number) first FROM samples GROUP BY content HAVING n > 1"
        total = self._one(f"SELECT COALESCE(SUM(n - 1), 0) FROM ({repeated})", ())
        rows = self.db.execute(f"SELECT content, n FROM ({repeated}) ORDER BY n DESC, first LIMIT ?", (most,))
        found = []
        for content, count in rows:
            first, second = self.db.execute(
                "SELECT split, value FROM samples WHERE content = ? ORDER BY number LIMIT 2", (content,)
            )
            found.append(Repeat(count, *((split, json.loads(value)[0]) for split, value in (first, second))))
        return total[0], found

    def copies(self) -> int:
        """How many media files have the content of another one."""
        return self._one("SELECT COUNT(key) - COUNT(DISTINCT key) FROM keys", ())[0]

    def _key(self, paths: tuple[str, ...]) -> str:
        """The content key of a media file, read once however often it is used."""
        which = _digest(paths)
        if (row := self._one("SELECT key, fault FROM keys WHERE paths = ?", (which,))) is None:
            begun = self._hashing.pop(which, None)
            try:
                row = begun.result() if begun else content_key(paths, self.max_bytes), None
            except BadMedia as error:
                row = None, str(error)
            self.db.execute("INSERT INTO keys (paths, key, fault) VALUES (?, ?, ?)", (which, *row))
        if row[1] is not None:
            raise BadMedia(row[1])
        return row[0]

    def _free_id(self, split: str, wanted: str) -> str:
        uses, free = self._use(split, wanted), wanted
        while uses > 1:
            free = f"{wanted}~{uses}"
            uses = uses + 1 if self._use(split, free) > 1 else 1
        return free

    def _use(self, split: str, id: str) -> int:
        query = "INSERT INTO ids VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET uses = uses + 1 RETURNING uses"
        return self._one(query, (split, id))[0]

    def _one(self, query: str, values: tuple) -> tuple | None:
        return self.db.execute(query, values).fetchone()


def _digest(value: object) -> bytes:
    return hashlib.sha256(json.dumps(value).encode()).digest()[:16]
