"""What the media paths in records mean: relative to a folder, a zip or a tar, locally or at a URL."""

from __future__ import annotations

import posixpath
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

from unimoe_ray.config.data import MEDIA_FIELDS
from unimoe_ray.data.locations import is_url, open_file, tar_member, version, zip_member
from unimoe_ray.data.schema import BadSample
from unimoe_ray.errors import UsageError

# The official evaluation takes a picture's base64 in place of its path, from this length on.
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{198,}={0,2}\s*")


@dataclass(frozen=True)
class Place:
    """Where the media of one field lie: a folder, a ``.zip`` or a ``.tar``, local or at a URL."""

    root: str

    def locate(self, path: str) -> str:
        """The location of what a record calls ``path``. Raises BadSample for a path that leads out of the place.

        Absolute local paths, as official records have them, are taken as they are unless the place is at a URL.
        """
        if path.startswith("data:"):
            return path
        if len(path) >= 200 and _BASE64.fullmatch(path):
            return f"data:;base64,{''.join(path.split())}"
        if is_url(path):
            if not path.startswith(f"{self.root.rstrip('/')}/"):
                raise BadSample(f"{path}: a URL outside of {self.root}")
            path = path[len(self.root.rstrip("/")) + 1 :]
        if path.startswith("/"):
            if is_url(self.root):
                raise BadSample(f"{path}: a path of this machine in records of {self.root}")
            return path
        inner = posixpath.normpath(unquote(path) if is_url(self.root) else path)
        if inner.startswith("..") and inner[2:3] in ("", "/"):
            raise BadSample(f"{path}: leads out of {self.root}")
        if self.root.endswith(".zip"):
            return zip_member(inner, self.root)
        if self.root.endswith(".tar"):
            found = _members(self.root, version(self.root)).get(inner, "no such file in the tar")
            if isinstance(found, str):
                raise BadSample(f"{self.root}:{path}: {found}")
            return tar_member(inner, *found, self.root)
        return f"{self.root.rstrip('/')}/{path}" if is_url(self.root) else str(Path(self.root) / path)


@dataclass(frozen=True)
class Places:
    """The place of each media field; ``here``: locations by the names that the records' own file gives them, such as
    members of a WebDataset sample."""

    fields: Mapping[str, Place]
    here: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def build(cls, media: str | Mapping[str, str] | None, folder: str) -> Places:
        """``media`` as in ``data.sources``, ``folder`` for fields that it does not name."""
        by_field = dict.fromkeys(MEDIA_FIELDS, media) if isinstance(media, str) else dict(media or {})
        return cls({name: Place(by_field.get(name, folder)) for name in MEDIA_FIELDS})

    def locate(self, name: str, path: str) -> str:
        """The location of what the field ``name`` calls ``path``. Raises BadSample."""
        return self.here[path] if path in self.here else self.fields[name].locate(path)


def tar_files(archive: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """An uncompressed tar and each of its members, in order, in constant memory. Raises UsageError when it is none or
    is damaged.

    Links, devices and names that lead out of the tar come too: who reads a member looks at what it is.
    """
    try:
        with open_file(archive) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                yield tar, member
                tar.members.clear()
    except tarfile.TarError as error:
        hint = "; members of a compressed tar can't be read one by one: unpack it" if _is_packed(archive) else ""
        raise UsageError(f"{archive}: not a tar that can be read ({error}){hint}") from None


def member_fault(member: tarfile.TarInfo) -> str | None:
    """Why a tar's member is not taken for a file of the tar, if it is not."""
    name = posixpath.normpath(member.name)
    if name.startswith(("/", "../")) or name == "..":
        return "leads out of the tar"
    if member.issym() or member.islnk():
        return "a link, not a file"
    if not member.isreg() or member.issparse():
        return "not a plain file"
    return None


def _is_packed(archive: str) -> bool:
    with open_file(archive) as file:
        return file.read(4).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd"))


@lru_cache(maxsize=4)
def _members(archive: str, changed: int) -> dict[str, tuple[int, int] | str]:
    """Offset and size of each file of a tar, or why it is not taken for one."""
    return {
        posixpath.normpath(member.name): member_fault(member) or (member.offset_data, member.size)
        for _, member in tar_files(archive)
        if not member.isdir()
    }
