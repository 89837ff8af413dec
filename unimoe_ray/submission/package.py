"""What a job is sent: the files of the current folder, and this package where the folder is not its checkout."""

from __future__ import annotations

import difflib
import shlex
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

import unimoe_ray
from unimoe_ray.errors import UsageError
from unimoe_ray.report.words import count

# Every node gets a copy, through the head's memory: larger things belong on storage that the nodes share.
MAX_BYTES = 100 * 2**20
PACKAGES = ("unimoe_ray", "serve", "jobs")
EXCLUDED = (".*_cache", ".hypothesis", "*.egg-info", "node_modules")
SOURCE = Path(unimoe_ray.__file__).resolve().parents[1]


@dataclass(frozen=True)
class Package:
    """files: by their path in the job's working folder. target: what Python runs, such as ``-m jobs.tune``."""

    files: dict[str, Path]
    target: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files.values())

    def __str__(self) -> str:
        return f"{count(len(self.files), 'file')}, {_mib(self.size)}"

    def entrypoint(self, python: str, arguments: Iterable[str]) -> str:
        """A line for the shell of the cluster."""
        return shlex.join([python, *self.target, *arguments])

    def write(self, path: Path) -> None:
        """As a zip that is the same for the same files, so that a cluster is sent it once."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=4) as archive:
            for name, file in sorted(self.files.items()):
                entry = zipfile.ZipInfo(name)
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = (file.stat().st_mode & 0xFFFF) << 16
                archive.writestr(entry, file.read_bytes())


def pack(job: str, folder: Path, needed: Iterable[str] = (), excludes: Iterable[str] = ()) -> Package:
    """Raises UsageError: no such job, a file that the job needs is not sent, or it is all too much.

    folder: the current one. needed: files of it, such as the configuration. excludes: as in .gitignore
    """
    folder = folder.resolve()
    own = _files(folder, [*get_runtime_env_default_excludes(), *EXCLUDED, *excludes])
    files = {} if (folder / "unimoe_ray" / "__init__.py").is_file() else _library()
    files |= own
    for name in needed:
        if name not in own:
            raise UsageError(f"{name}: left out of what is sent, by .gitignore, .rayignore or --exclude")
    package = Package(files, _target(job, folder, own, files))
    if package.size > MAX_BYTES:
        raise UsageError(
            f"{folder}: {package} to send, at most {_mib(MAX_BYTES)}; the largest: {_largest(files)}; leave them out "
            "with --exclude or .rayignore, and put what the job needs where all nodes can read it"
        )
    return package


def inside(path: Path, folder: Path) -> str | None:
    """Its path in the job's working folder; None outside of it."""
    found = path.resolve()
    return found.relative_to(folder.resolve()).as_posix() if found.is_relative_to(folder.resolve()) else None


def _files(folder: Path, excludes: list[str]) -> dict[str, Path]:
    """Files below a folder as Ray would send them: without what ``excludes``, .gitignore and .rayignore name."""
    found: dict[str, Path] = {}

    def see(path: Path) -> None:
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = path

    _dir_travel(folder, [_get_excludes(folder, excludes)], see, include_gitignore=True)
    return found


def _library() -> dict[str, Path]:
    """This package and its jobs, from wherever they are installed."""
    return {
        f"{name}/{inner}": file
        for name in PACKAGES
        for inner, file in _files(SOURCE / name, get_runtime_env_default_excludes()).items()
    }


def _target(job: str, folder: Path, own: dict[str, Path], files: dict[str, Path]) -> tuple[str, ...]:
    """A file in a package runs as a module: its neighbours would otherwise hide other modules of their names."""
    path = inside(folder / job, folder)
    if path is None:
        raise UsageError(f"{job}: outside of the current folder, of which the job gets a copy")
    if path in own or path in files:
        parents = PurePosixPath(path).parents[:-1]
        if parents and all(f"{parent}/__init__.py" in files for parent in parents):
            return "-m", path.removesuffix(".py").replace("/", ".")
        return (path,)
    if (folder / job).is_file():
        raise UsageError(f"{job}: left out of what is sent, by .gitignore, .rayignore or --exclude")
    jobs = [
        n for n in files if n.startswith("jobs/") and n.endswith(".py") and "__main__" in files[n].read_text("utf-8")
    ]
    known = jobs + [n for n in own if n.endswith(".py") and n not in jobs]
    near = difflib.get_close_matches(path, known, n=1, cutoff=0.6) or difflib.get_close_matches(
        path, jobs, n=1, cutoff=0
    )
    raise UsageError(f"{job}: no such job; did you mean {near[0]}? (jobs: {', '.join(sorted(jobs))})")


def _largest(files: dict[str, Path]) -> str:
    """The three largest of the top level."""
    sizes: dict[str, int] = {}
    for name, file in files.items():
        top = name.split("/", 1)[0] + ("/" if "/" in name else "")
        sizes[top] = sizes.get(top, 0) + file.stat().st_size
    ranked = sorted(sizes, key=lambda top: -sizes[top])[:3]
    return ", ".join(f"{top} {_mib(sizes[top])}" for top in ranked)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
