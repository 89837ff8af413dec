"""Folders of files, on a disk or behind a URL that fsspec or pyarrow reads. A crash leaves no file half written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fsspec.implementations.local import LocalFileSystem

from unimoe_ray.data.locations import file_system, os_errors


@dataclass(frozen=True)
class Folder:
    """A folder by its local path or URL; it need not exist. Its methods raise OSError, and UsageError for a URL that
    nothing reads. What they wrote is on the disk when they return."""

    location: str

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.location.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        return self.location.rstrip("/").rpartition("/")[2]

    def names(self) -> list[str]:
        """Of files and folders in it, sorted; none where there is no such folder."""
        system, path = file_system(self.location)
        with os_errors(self.location):
            system.invalidate_cache(path)
            try:
                found = system.ls(path, detail=False)
            except FileNotFoundError:
                return []
        # Some list a folder's own marker, or the path itself when it is a file.
        return sorted({entry.rstrip("/").rpartition("/")[2] for entry in found if entry.strip("/") != path.strip("/")})

    def make(self) -> None:
        system, path = file_system(self.location)
        with os_errors(self.location):
            system.makedirs(path, exist_ok=True)

    def size(self, name: str) -> int:
        """Bytes of a file."""
        system, path = file_system((self / name).location)
        with os_errors(self.location):
            return int(system.info(path)["size"])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes ``start`` to ``stop`` of a file; fewer where it ends before."""
        system, path = file_system((self / name).location)
        with os_errors(self.location), system.open(path, "rb", cache_type="none") as file:
            file.seek(start)
            return file.read(-1 if stop is None else stop - start)

    def chunks(self, name: str, size: int = 2**23) -> Iterator[bytes]:
        """A file from its start, in order."""
        system, path = file_system((self / name).location)
        with os_errors(self.location), system.open(path, "rb", cache_type="readahead") as file:
            while data := file.read(size):
                yield data

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """A file to write from its start to its end, in a folder that exists."""
        system, path = file_system((self / name).location)
        with os_errors(self.location), system.open(path, "wb") as file:
            yield file
            if isinstance(system, LocalFileSystem):
                file.flush()
                os.fsync(file.fileno())

    def put(self, name: str, data: bytes) -> None:
        """A small file that is there as a whole or not at all."""
        system, path = file_system((self / name).location)
        if not isinstance(system, LocalFileSystem):
            with os_errors(self.location):
                system.pipe_file(path, data)  # objects are visible once complete
            return
        with self.create(f".{name}.new") as file:
            file.write(data)
        target = Path(path)
        target.with_name(f".{name}.new").replace(target)
        for folder in (target.parent, target.parent.parent):
            _sync_folder(folder)

    def remove_file(self, name: str) -> None:
        system, path = file_system((self / name).location)
        with os_errors(self.location):
            system.rm_file(path)

    def remove(self) -> None:
        """The folder with all that is in it, if it is there."""
        system, path = file_system(self.location)
        with os_errors(self.location):
            system.invalidate_cache(path)
            if system.exists(path):
                system.rm(path, recursive=True)


def _sync_folder(folder: Path) -> None:
    """So that the names in it outlast a power cut, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
