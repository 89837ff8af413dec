"""A kernel as a library: compiled for this machine at first use, then kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch  # noqa: F401  loads the OpenMP runtime

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")


class KernelUnavailable(Exception):
    """One line: why the kernel can't be used here."""


@lru_cache
def library(name: str) -> ctypes.CDLL:
    """``name``.cpp of this folder. Raises KernelUnavailable."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise KernelUnavailable("there is no C++ compiler (g++)")
    source = FOLDER / f"{name}.cpp"
    path = _cache() / f"{name}-{_fingerprint(compiler, source)}.so"
    if not path.exists():
        _compile(compiler, source, path)
    try:
        # Its OpenMP runtime is the one that torch has loaded already: the same threads work for both.
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelUnavailable(f"{path}: {error}") from error


def _compile(compiler: str, source: Path, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder, path.name)
            command = [compiler, *FLAGS, "-o", str(made), str(source)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
                raise KernelUnavailable(f"{compiler} failed: {lines[0] if lines else done.returncode}")
            made.rename(path)  # whole or not at all, whoever else compiles it at the same time
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelUnavailable(f"compiling it failed: {error}") from error


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "unimoe_ray"


def _fingerprint(compiler: str, source: Path) -> str:
    """Of all that the compiled code depends on; a home directory may be shared by unlike machines."""
    try:
        version = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelUnavailable(f"{compiler} does not run: {error}") from error
    sources = [path.read_bytes() for path in (source, *sorted(FOLDER.glob("*.h")))]
    parts = (*sources, " ".join(FLAGS).encode(), version.encode(), _processor().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
