"""Files of records, read as streams: JSON lists, JSON lines, Parquet tables and WebDataset tars.

Every reader yields ``Raw`` entries and holds a bounded part of its file. What is wrong with one record is that record's
reason; a file whose rest can't be read (broken JSON, a damaged tar) raises UsageError.
"""

from __future__ import annotations

import codecs
import json
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import pyarrow as pa

from unimoe_ray.config.data import MEDIA_FIELDS
from unimoe_ray.data.locations import cell, open_file, reason, tar_member
from unimoe_ray.data.places import member_fault, tar_files
from unimoe_ray.errors import UsageError

PIECE = 2**20
MAX_RECORD = 64 * 2**20  # characters or bytes; a record with more is no conversation
ROWS = 32
_SPACE = re.compile(r"[ \t\n\r]*")
_FORMATS = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".tar": "webdataset"}
_FIELD_OF = dict.fromkeys(("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif"), "image")
_FIELD_OF |= dict.fromkeys(("wav", "flac", "ogg", "opus", "mp3", "m4a", "aac"), "voice")
_FIELD_OF |= dict.fromkeys(("mp4", "webm", "mkv", "mov", "avi"), "video")
_IMAGE_HEADS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")


@dataclass(frozen=True)
class Raw:
    """An entry of a file: what it holds, or why that can't be read. ``where``: its place in the file; ``index``: its
    number; ``media``: locations by the names that the record uses for media of its own file."""

    where: str
    index: int
    record: Any = None
    fault: str | None = None
    media: Mapping[str, str] = field(default_factory=dict)


def read_file(url: str, form: str) -> Iterator[Raw]:
    """The entries of one file, in order. form: ``json``, ``jsonl``, ``parquet``, ``webdataset`` or ``auto``: by name.

    Raises UsageError (the file is none of that format, or is damaged), OSError.
    """
    return _READERS[format_of(url) if form == "auto" else form](url)


def format_of(url: str) -> str:
    """By the ending of the name. Raises UsageError."""
    ending = posixpath.splitext(url)[1].lower()
    if ending not in _FORMATS:
        raise UsageError(f"{url}: unknown ending; allowed: {', '.join(_FORMATS)}, or say which format it has")
    return _FORMATS[ending]


def is_record_file(url: str) -> bool:
    return posixpath.splitext(url)[1].lower() in _FORMATS


def read_json(url: str, key: str | None = None) -> Iterator[Raw]:
    """A JSON list: its elements one by one, the text in pieces. key: the list that the file's object has under it."""
    with open_file(url) as file:
        text = _Text(file, url)
        if key is not None:
            text.enter(key)
        if text.peek() != "[":
            raise text.no_list()
        text.position += 1
        index = 0
        while True:
            if index == 0 and text.peek() == "]":
                break
            value = text.value(index)
            yield Raw(f"record {index}", index, value)
            index += 1
            if (mark := text.peek()) == "]":
                break
            if mark != ",":
                raise text.broken(index, "a comma or ] is missing")
            text.position += 1
            text.peek()
        text.position += 1
        if key is None and text.peek():
            raise text.broken(index, "there is more after the list")


def read_jsonl(url: str) -> Iterator[Raw]:
    """One record a line; empty lines count, but are no records."""
    with open_file(url) as file:
        number = 0
        while line := file.readline(MAX_RECORD + 1):
            number += 1
            where = f"line {number}"
            if len(line) > MAX_RECORD:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_RECORD)
                yield Raw(where, number - 1, fault=f"longer than {MAX_RECORD} bytes")
            elif line.strip():
                yield _line(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, where, number - 1)


def read_parquet(url: str) -> Iterator[Raw]:
    """One record a row. Media columns hold paths, bytes, ``{bytes, path}`` (as Hugging Face writes them), or lists."""
    from pyarrow import parquet

    try:
        with open_file(url) as file, parquet.ParquetFile(file, pre_buffer=False) as table:
            columns = table.schema_arrow.names
            if "conversations" not in columns:
                raise UsageError(f"{url}: has no column 'conversations'; it has {', '.join(columns)}")
            index = 0
            for batch in table.iter_batches(ROWS, use_threads=False):
                for row in batch.to_pylist():
                    yield _row(row, index, url)
                    index += 1
    except pa.ArrowException as error:
        raise UsageError(f"{url}: not a Parquet file that can be read ({reason(error)})") from None


def read_webdataset(url: str) -> Iterator[Raw]:
    """Members whose names agree up to the first dot of the last part make a sample: ``<key>.json`` is the record.

    Its media fields name members (``<key>.jpg``, or only ``jpg``). A record without media fields gets the sample's
    members: by their names (``<key>.speech.wav``), else by their endings (pictures ``image``, sounds ``voice``, films
    ``video``), in the order of the tar.
    """
    index, group = 0, None
    for tar, member in tar_files(url):
        folder, name = posixpath.split(posixpath.normpath(member.name))
        if member.isdir() or name.startswith((".", "__")):  # what systems and tools leave behind
            continue
        stem, _, ending = name.partition(".")
        key = posixpath.join(folder, stem)
        if group is not None and key != group.key:
            yield group.raw(index)
            index, group = index + 1, None
        group = group or _Group(key)
        if fault := member_fault(member):
            group.fault = f"{member.name}: {fault}"
        elif ending in group.members:
            group.fault = f"{member.name}: is in the tar twice"
        elif ending == "json" and member.size > MAX_RECORD:
            group.fault = f"{member.name}: longer than {MAX_RECORD} bytes"
        elif ending == "json":
            group.json = tar.extractfile(member).read()
        else:
            group.members[ending] = member.name, tar_member(member.name, member.offset_data, member.size, url)
    if group is not None:
        yield group.raw(index)


class _Text:
    """The text of a JSON file from ``position`` on, as much of it as was needed."""

    def __init__(self, file: BinaryIO, url: str):
        self.file, self.url = file, url
        # Bytes that are no UTF-8 become halves of surrogate pairs, which the schema finds in the record that has them.
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.json = json.JSONDecoder()
        self.text, self.position, self.ended = "", 0, False
        if self.more() and self.text.startswith("\ufeff"):
            self.position = 1

    def more(self) -> bool:
        """Read on: as much again as is there, so that a long record costs linear time. False at the end."""
        if self.ended:
            return False
        left = self.text[self.position :]
        data = self.file.read(max(PIECE, len(left)))
        self.ended = not data
        self.text, self.position = left + self.decoder.decode(data, final=self.ended), 0
        return True

    def peek(self) -> str:
        """The next character that is no space, "" at the end."""
        while True:
            self.position = _SPACE.match(self.text, self.position).end()
            if self.position < len(self.text) or not self.more():
                return self.text[self.position : self.position + 1]

    def value(self, index: int) -> Any:
        """The JSON value at ``position``, which is then behind it."""
        while True:
            try:
                value, end = self.json.raw_decode(self.text, self.position)
                # A number near the end of what was read may go on (1, 1., 1.5e+, 1.5e+7).
                if end + 3 <= len(self.text) or not self.more():
                    self.position = end
                    return value
            except RecursionError:
                raise self.broken(index, "nested too deeply") from None
            except ValueError as error:
                if len(self.text) - self.position > MAX_RECORD or not self.more():
                    raise self.broken(index, getattr(error, "msg", str(error))) from None

    def enter(self, key: str) -> None:
        """Goes to the value that the object at ``position`` has under ``key``; what stands before it is skipped."""
        mark = "{"
        while self.peek() == mark:
            self.position += 1
            if self.peek() != '"':
                break
            name = self.value(0)
            if self.peek() != ":":
                break
            self.position += 1
            if name == key:
                return
            self.peek()
            self.value(0)
            mark = ","
        raise UsageError(f"{self.url}: must hold a JSON object with a list under '{key}'")

    def broken(self, index: int, why: str) -> UsageError:
        return UsageError(f"{self.url}: not valid JSON at record {index} ({why})")

    def no_list(self) -> UsageError:
        kind = {"{": "dict", '"': "str"}.get(self.peek())
        if kind is None:
            return UsageError(f"{self.url}: not valid JSON for a list of records")
        lines = "; a file with a record a line is of format jsonl" if kind == "dict" else ""
        return UsageError(f"{self.url}: must hold a JSON list of records, not {kind}{lines}")


def _line(line: bytes, where: str, index: int) -> Raw:
    try:
        return Raw(where, index, json.loads(line.decode("utf-8")))
    except UnicodeDecodeError:
        return Raw(where, index, fault="has bytes that are not UTF-8")
    except json.JSONDecodeError as error:
        return Raw(where, index, fault=f"not valid JSON ({error.msg})")
    except ValueError as error:  # a number of thousands of digits
        return Raw(where, index, fault=f"not valid JSON ({error})")
    except RecursionError:
        return Raw(where, index, fault="not valid JSON (nested too deeply)")


def _row(row: dict[str, Any], index: int, url: str) -> Raw:
    """Null means that a record lacks the key, as Parquet has no other way to say it."""
    record, media = {key: value for key, value in row.items() if value is not None}, {}

    def take(column: str, value: Any, position: int | None = None) -> Any:
        path = None
        if isinstance(value, dict) and value.keys() & {"bytes", "path"}:
            value, path = value.get("bytes"), value.get("path")
        if not isinstance(value, bytes):
            return value if path is None else path
        location = cell(index, column, position, url)
        media[location] = location
        return location

    for column in record.keys() & set(MEDIA_FIELDS):
        value = record[column]
        if isinstance(value, list):
            record[column] = [take(column, entry, i) for i, entry in enumerate(value)]
            if column == "video" and value and all(_looks_like_image(entry) for entry in value):
                record[column] = [record[column]]
        else:
            record[column] = take(column, value)
    return Raw(f"row {index}", index, record, media=media)


def _looks_like_image(value: Any) -> bool:
    data = value.get("bytes") if isinstance(value, dict) else value
    return isinstance(data, bytes) and (data.startswith(_IMAGE_HEADS) or data[8:12] == b"WEBP")


@dataclass
class _Group:
    """The members of a WebDataset sample: (name, location) by the part of the name after the key."""

    key: str
    members: dict[str, tuple[str, str]] = field(default_factory=dict)
    json: bytes | None = None
    fault: str | None = None

    def raw(self, index: int) -> Raw:
        where = f"sample {self.key}"
        if self.fault or self.json is None:
            return Raw(where, index, fault=self.fault or "has no .json member")
        raw = _line(self.json, where, index)
        if not isinstance(raw.record, dict):
            return raw
        raw.record.setdefault("id", self.key)
        media = {}
        for ending, (name, location) in self.members.items():
            media |= dict.fromkeys((ending, posixpath.basename(name), name), location)
        if not raw.record.keys() & set(MEDIA_FIELDS):
            for ending, (name, _) in self.members.items():
                head, _, last = ending.lower().rpartition(".")
                named = next((part for part in head.split(".") if part in MEDIA_FIELDS), None)
                if target := named or _FIELD_OF.get(last):
                    raw.record.setdefault(target, []).append(name)
        return Raw(where, index, raw.record, media=media)


_READERS: dict[str, Callable[[str], Iterator[Raw]]] = {
    "json": read_json,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "webdataset": read_webdataset,
}
