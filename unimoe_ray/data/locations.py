"""Where a media file lies, as one string, and how its bytes are read.

A location is a local path, a URL, a data URL, or a part of another file, written before that file's location:

    zip://<member>::<file>                   a member of a zip
    tar://<offset>+<size>/<member>::<file>   the bytes of a member of an uncompressed tar
    cell://<row>/<column>[/<index>]::<file>  a value of a Parquet file (an entry of a list)

Records can't write these forms: ``data.places`` makes them of what records say. Members are percent-encoded.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import stat
import threading
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, unquote

import fsspec
import pyarrow as pa
from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.implementations.local import LocalFileSystem
from pyarrow import fs as arrow_fs

from unimoe_ray.errors import UsageError

# pyarrow reads these itself; fsspec would need a package more for each.
NATIVE = ("s3", "gs", "hdfs")
_TABLES = threading.Lock()  # a Parquet reader serves one thread at a time
_BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, ValueError)


class BadMedia(Exception):
    """A file that can't be used, with the reason in one line (its name included)."""


class MediaBytes(io.BytesIO):
    """A media file in memory; ``name`` stands for it in error messages."""

    def __init__(self, data: bytes, name: str):
        super().__init__(data)
        self.name = name


def is_url(path: str) -> bool:
    return "://" in path


def zip_member(member: str, archive: str) -> str:
    return f"zip://{quote(member)}::{archive}"


def tar_member(member: str, offset: int, size: int, archive: str) -> str:
    return f"tar://{offset}+{size}/{quote(member)}::{archive}"


def cell(row: int, column: str, index: int | None, table: str) -> str:
    return f"cell://{row}/{quote(column, safe='')}{'' if index is None else f'/{index}'}::{table}"


def shown(location: str) -> str:
    """A location as a person would write it."""
    scheme, inner, outer = _parse(location)
    if scheme == "data":
        head = location.partition(",")[0]
        return f"{head if len(head) < 60 else 'data:'},... ({len(location)} characters)"
    if scheme == "cell":
        row, column, *index = inner.split("/")
        return f"{outer} row {row} {unquote(column)}{''.join(f'[{i}]' for i in index)}"
    if scheme == "zip":
        return f"{outer}:{unquote(inner)}"
    if scheme == "tar":
        return f"{outer}:{unquote(inner.partition('/')[2])}"
    return location


def open_media(location: str, max_bytes: int) -> str | MediaBytes:
    """A local file's own path, checked, or the bytes of anything else. Raises BadMedia: not there, not a plain file,
    empty, or more than ``max_bytes`` (before they are read or unpacked)."""
    scheme, inner, outer = _parse(location)
    name = shown(location)
    try:
        if not scheme:
            return _check_local(location, max_bytes)
        data = _READERS.get(scheme, _read_url)(inner, outer or location, name, max_bytes)
    except (OSError, pa.ArrowException) as error:
        raise BadMedia(f"{name}: {reason(error)}") from None
    if not data:
        raise BadMedia(f"{name}: has no bytes")
    return MediaBytes(data, name)


def content_key(locations: Iterable[str], max_bytes: int) -> str:
    """SHA-256 over the bytes of a media file (or of a video's frame files, in order). Raises BadMedia."""
    total = hashlib.sha256()
    for location in locations:
        media = open_media(location, max_bytes)
        try:
            with open(media, "rb") if isinstance(media, str) else media as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise BadMedia(f"{location}: {reason(error)}") from None
    return total.hexdigest()


def reason(error: Exception) -> str:
    """One line of an error: what the system, FFmpeg or libsndfile says, without the Python object that was read."""
    if isinstance(error, FileNotFoundError):
        return "No such file or directory"
    said = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    return " ".join(said.split()) or type(error).__name__


def file_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a local path or URL, and the path in it. Raises UsageError for a URL that nothing reads."""
    scheme, _, rest = url.partition("://")
    if not rest:
        return LocalFileSystem(), url
    try:
        if scheme in NATIVE:
            return _native(scheme, rest.partition("/")[0]), rest
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError, pa.ArrowException) as error:
        raise UsageError(f"{url}: {reason(error)}") from None


def open_file(url: str) -> BinaryIO:
    """A local file or URL, open for random access. Raises OSError, UsageError."""
    system, path = file_system(url)
    with os_errors(url):
        return system.open(path, "rb")


@contextmanager
def os_errors(url: str) -> Iterator[None]:
    """HTTP's client has errors of its own; here they become OSErrors, as those of files are."""
    if not url.startswith(("http://", "https://")):
        yield
        return
    import aiohttp

    try:
        yield
    except aiohttp.ClientError as error:
        raise OSError(reason(error)) from None


@lru_cache(maxsize=32)
def _native(scheme: str, authority: str) -> ArrowFSWrapper:
    return ArrowFSWrapper(arrow_fs.FileSystem.from_uri(f"{scheme}://{authority}")[0])


def _parse(location: str) -> tuple[str, str, str]:
    """scheme, what is inside, and the file that it is in: scheme is "" for a local path, the file "" for a whole."""
    if location.startswith("data:"):
        return "data", location, ""
    scheme, _, rest = location.partition("://")
    if scheme not in _READERS:
        return (scheme, location, "") if rest else ("", location, "")
    inner, _, outer = rest.partition("::")
    return scheme, inner, outer


def _check_size(size: int, name: str, max_bytes: int) -> None:
    if size > max_bytes:
        raise BadMedia(f"{name}: {size} bytes; at most {max_bytes} are allowed (data.max_bytes)")


def _check_local(path: str, max_bytes: int) -> str:
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        raise BadMedia(f"{path}: Is a directory")
    if not stat.S_ISREG(found.st_mode):  # reading a pipe or a device may never end
        raise BadMedia(f"{path}: not a plain file")
    if not found.st_size:
        raise BadMedia(f"{path}: has no bytes")
    _check_size(found.st_size, path, max_bytes)
    return path


def _read_url(_: str, url: str, name: str, max_bytes: int) -> bytes:
    with os_errors(url), open_file(url) as file:
        if (size := getattr(file, "size", None)) is not None:
            _check_size(size, name, max_bytes)
        data = file.read(max_bytes + 1)
    _check_size(len(data), name, max_bytes)
    return data


def _read_data_url(_: str, url: str, name: str, max_bytes: int) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise BadMedia(f"{name}: a data URL begins with data:<type>;base64,")
    _check_size(len(body) // 4 * 3, name, max_bytes)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadMedia(f"{name}: not base64 ({error})") from None


def _read_zip(inner: str, archive: str, name: str, max_bytes: int) -> bytes:
    try:
        file = _zip(archive, version(archive))
        member = file.getinfo(unquote(inner))
        if stat.S_ISLNK(member.external_attr >> 16):
            raise BadMedia(f"{name}: a link, not a file")
        _check_size(member.file_size, name, max_bytes)
        with file.open(member) as unpacked:
            data = unpacked.read(max_bytes + 1)  # the size in the directory may be a lie
        _check_size(len(data), name, max_bytes)
        return data
    except KeyError:
        raise BadMedia(f"{name}: no such file in the zip") from None
    except _BROKEN_ZIP as error:
        raise BadMedia(f"{name}: {reason(error)}") from None


def _read_tar(inner: str, archive: str, name: str, max_bytes: int) -> bytes:
    offset, size = map(int, inner.partition("/")[0].split("+"))
    _check_size(size, name, max_bytes)
    with os_errors(archive), open_file(archive) as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise BadMedia(f"{name}: the tar ends {size - len(data)} bytes too early")
    return data


def _read_cell(inner: str, table: str, name: str, max_bytes: int) -> bytes:
    row, column, *index = inner.split("/")
    with _TABLES:
        value = _row(table, version(table), unquote(column), int(row))
    for i in index:
        value = value.values[int(i)]
    if isinstance(value, pa.StructScalar):
        value = value["bytes"]
    buffer = value.as_buffer()
    _check_size(buffer.size, name, max_bytes)
    return buffer.to_pybytes()


def _row(table: str, version: int, column: str, row: int) -> pa.Scalar:
    parquet = _parquet(table, version)
    for group in range(parquet.num_row_groups):
        if row < (rows := parquet.metadata.row_group(group).num_rows):
            return _group(table, version, column, group)[row]
        row -= rows
    raise BadMedia(f"{table}: has no such row")


def version(path: str) -> int:
    """Something that changes when a local file does; what is at a URL is taken to stay."""
    return 0 if is_url(path) else Path(path).stat().st_mtime_ns


@lru_cache(maxsize=8)
def _zip(archive: str, version: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(open_file(archive))


@lru_cache(maxsize=8)
def _parquet(table: str, version: int):
    from pyarrow import parquet

    return parquet.ParquetFile(open_file(table), pre_buffer=False)


@lru_cache(maxsize=4)
def _group(table: str, version: int, column: str, group: int) -> pa.ChunkedArray:
    """One column of one row group. Media are asked for in the order of rows, so that each group is read about once."""
    return _parquet(table, version).read_row_group(group, columns=[column], use_threads=False)[column]


_READERS = {"data": _read_data_url, "zip": _read_zip, "tar": _read_tar, "cell": _read_cell}
