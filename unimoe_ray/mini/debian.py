"""Optional Debian packages as data: downloaded with apt-get, read with dpkg-deb, never installed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from unimoe_ray.errors import UnimoeError

_DOWNLOAD_SECONDS = 900
_UPDATE_SECONDS = 180
# A machine without a network must fail in seconds, not after apt's default of several minutes.
_QUICK = ["-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20", "-o", "Acquire::https::Timeout=20"]


def unavailable() -> str | None:
    """Why Debian packages can't be had on this machine at all, or None."""
    if os.environ.get("UNIMOE_MINI_DEBIAN") == "0":
        return "UNIMOE_MINI_DEBIAN=0"
    absent = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    return f"{' and '.join(absent)} not on PATH" if absent else None


def download(package: str, version: str, folder: Path) -> Path:
    """Download one .deb into the empty ``folder`` and return its path. Runs ``apt-get update`` once where the package
    is unknown and the user is root. Raises UnimoeError with apt's own reason."""
    if os.geteuid() == 0:
        # apt fetches as the user _apt, who can write only to a folder of its own.
        folder.chmod(0o755)
        with contextlib.suppress(LookupError, PermissionError):
            shutil.chown(folder, "_apt")
    command = ["apt-get", *_QUICK, "-q", "download", f"{package}={version}"]
    code, reason = _run(command, folder, _DOWNLOAD_SECONDS)
    if code != 0 and os.geteuid() == 0 and ("Unable to locate" in reason or "was not found" in reason):
        _run(["apt-get", *_QUICK, "-q", "update"], folder, _UPDATE_SECONDS)
        code, reason = _run(command, folder, _DOWNLOAD_SECONDS)
    found = sorted(folder.glob("*.deb"))
    if code != 0 or len(found) != 1:
        raise UnimoeError(f"{package} {version}: apt-get download failed: {reason}")
    return found[0]


def members(deb: Path) -> Iterator[tuple[str, int, BinaryIO]]:
    """Name, size in bytes and content of each regular file of a .deb, in the archive's order. Links are skipped.
    Raises UnimoeError when dpkg-deb can't read it."""
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as unpacker:
        try:
            with tarfile.open(fileobj=unpacker.stdout, mode="r|") as tar:
                for member in tar:
                    if member.isfile():
                        yield member.name.removeprefix("./"), member.size, tar.extractfile(member)
        except tarfile.TarError as error:
            raise UnimoeError(f"{deb.name}: not a readable Debian package: {error}") from error
        finally:
            unpacker.terminate()


def _run(command: list[str], folder: Path, seconds: float) -> tuple[int, str]:
    """Exit code and the most telling line of the output."""
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace", timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return 1, f"no answer within {seconds:.0f} s"
    lines = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("E:")]
    return done.returncode, (errors or lines or ["no output"])[-1]
