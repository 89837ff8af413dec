"""``unimoe doctor``: what this machine has, what it lacks, and what to do about each finding."""

from __future__ import annotations

import json as jsonlib
import os
import platform
import shutil
import socket
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

GIB = 2**30
PACKAGES = ("torch", "ray", "deepspeed", "transformers", "peft", "av")
PORTS = {
    8000: ("Ray Serve's HTTP port", "serve on another one, or end the program that uses it"),
    8265: ("Ray's dashboard and job port", "a Ray cluster may be running here: submit to it, or give --dashboard-port"),
    6379: ("Ray's GCS port", "a Ray cluster (or Redis) may be running here: join it with ray_address, or give --port"),
    52365: ("Ray's dashboard agent port", "'ray job submit' to a second cluster fails: give it another agent port"),
}


@dataclass(frozen=True)
class Finding:
    """``level`` is ok, warn or fail; ``advice`` says what to do and is empty when nothing needs doing."""

    group: str
    name: str
    value: str
    level: str = "ok"
    advice: str = ""


def run(json: bool) -> int:
    """Print the findings as a table, or as one JSON object; 1 if any of them is a failure, else 0."""
    found = findings()
    failed = any(item.level == "fail" for item in found)
    if json:
        print(jsonlib.dumps({"ok": not failed, "findings": [asdict(item) for item in found]}, indent=1))
    else:
        _print(found)
    return int(failed)


def findings() -> list[Finding]:
    """Everything that is looked at, in the order of display."""
    checks = (_software, _compilers, _processor, _gpus, _memory, _disk, _network, _ray)
    return [finding for check in checks for finding in check()]


def _software() -> Iterator[Finding]:
    version = platform.python_version()
    supported = (3, 11) <= sys.version_info[:2] < (3, 13)
    yield Finding(
        "software", "python", version, *(() if supported else ("warn", "the project is tested with Python 3.11"))
    )
    pins = _pins()
    for name in PACKAGES:
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(
                "software", name, "missing", "fail", "run 'make install', or pip install -c constraints.txt ."
            )
            continue
        public = installed.split("+")[0]
        wanted = pins.get(name, public)
        if public == wanted:
            yield Finding("software", name, installed)
        else:
            advice = f"the project is tested with {wanted}: pip install {name}=={wanted}"
            yield Finding("software", name, installed, "warn", advice)


def _pins() -> dict[str, str]:
    """Exact versions that this package asks for; empty where it runs from a source tree that is not installed."""
    try:
        lines = metadata.requires("unimoe_ray") or []
    except metadata.PackageNotFoundError:
        return {}
    pins = (line.split(";")[0].split("==") for line in lines if "==" in line.split(";")[0])
    return {name.split("[")[0].strip(): version.strip() for name, version in pins}


def _compilers() -> Iterator[Finding]:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    yield _present("C compiler", compiler, "install the system package gcc: kernels are compiled at run time on GPUs")
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    yield _present("C++ compiler", compiler, "install the system package g++: DeepSpeed's own operators need it")
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    yield _present("ninja", ninja, "pip install ninja: DeepSpeed's own operators need it")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    advice = "install the system package python3-dev: kernels compiled at run time on GPUs need it"
    yield _present("Python headers", str(header) if header.is_file() else None, advice)


def _present(name: str, path: str | None, advice: str) -> Finding:
    return Finding("software", name, path) if path else Finding("software", name, "missing", "warn", advice)


def _processor() -> Iterator[Finding]:
    cores = usable_cores()
    advice = "training takes one worker per core: with one core, one worker and more time"
    yield Finding("machine", "CPU cores", f"{cores:g}", *(() if cores >= 2 else ("warn", advice)))
    flags = _cpu_flags()
    fast = [name for flag, name in (("avx512_bf16", "AVX512-BF16"), ("amx_bf16", "AMX")) if flag in flags]
    text = f"bf16 in hardware ({', '.join(fast)})" if fast else "no AVX512-BF16 or AMX: fp32 is used on the CPU"
    yield Finding("machine", "CPU bf16", text)


def usable_cores() -> float:
    """Cores that this process may use: its affinity, and the CPU quota of its control group where there is one."""
    cores = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, int(quota[0]) / int(quota[1]))
    return cores


def _cpu_flags() -> set[str]:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.split(":", 1)[1].split())
    return set()


def _gpus() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        advice = "torch is installed but does not load: install it again with 'make clean install'"
        yield Finding("machine", "GPUs", f"torch: {error}", "fail", advice)
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            text = f"{device.name}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
            bf16 = device.major >= 8
            advice = "no bf16 in hardware: set training.precision=fp32"
            yield Finding("machine", f"GPU {index}", text, *(() if bf16 else ("warn", advice)))
        if not torch.distributed.is_nccl_available():
            yield Finding("machine", "NCCL", "missing", "warn", "this build of torch has no NCCL: several GPUs need it")
    elif Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        build = "a CPU build of torch" if torch.version.cuda is None else f"CUDA {torch.version.cuda} finds no device"
        advice = "install a CUDA build of torch that suits the driver (see nvidia-smi)"
        yield Finding("machine", "GPUs", f"not usable: {build}", "warn", advice)
    else:
        yield Finding("machine", "GPUs", "none: everything runs on the CPU")


def _memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    free = memory.available
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        free = min(free, int(limit) - int(_read("/sys/fs/cgroup/memory.current") or 0))
    text = f"{free / GIB:.1f} GiB free"
    if free < 4 * GIB:
        yield Finding("machine", "memory", text, "fail", "the mini preset needs up to 10 GiB: end other programs")
    elif free < 10 * GIB:
        yield Finding(
            "machine", "memory", text, "warn", "the mini preset needs up to 10 GiB; training.workers=1 takes less"
        )
    else:
        yield Finding("machine", "memory", text)


def _disk() -> Iterator[Finding]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    places = (
        ("here", Path.cwd(), 5, 1, "runs and features are written here: make room, or set runs_dir and data.dir"),
        ("cache", cache, 1, 0.3, "the embedded models and data are kept here: make room, or set XDG_CACHE_HOME"),
        ("/tmp", Path("/tmp"), 5, 1, "Ray keeps its session and spilled objects here: make room, or set RAY_TMPDIR"),
    )
    for name, place, wanted, needed, advice in places:
        usage = shutil.disk_usage(_existing(place))
        text = f"{usage.free / GIB:.1f} GiB free in {place}"
        level = "fail" if usage.free < needed * GIB else "warn" if usage.free < wanted * GIB else "ok"
        yield Finding("disk", name, text, level, advice if level != "ok" else "")
    yield _shared_memory(Path("/dev/shm"))


def _shared_memory(place: Path) -> Finding:
    """Ray's object store lives in shared memory; where that is too small, Ray takes /tmp, which is slow."""
    if not place.is_dir():
        return Finding("disk", str(place), "none: Ray's object store uses /tmp")
    free = shutil.disk_usage(place).free
    text = f"{free / GIB:.1f} GiB free in {place}"
    if free < GIB:
        advice = "Ray's object store falls back to /tmp, slowly: in a container, give --shm-size=2g or more"
        return Finding("disk", "shared memory", text, "warn", advice)
    return Finding("disk", "shared memory", text)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _network() -> Iterator[Finding]:
    for port, (use, advice) in PORTS.items():
        if port_is_free(port):
            yield Finding("network", f"port {port}", f"free ({use})")
        else:
            yield Finding("network", f"port {port}", f"in use ({use})", "warn", advice)


def port_is_free(port: int) -> bool:
    """Whether a server on this machine could listen on ``port`` (IPv4, all addresses)."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


def _ray() -> Iterator[Finding]:
    address = os.environ.get("RAY_ADDRESS")
    yield Finding("ray", "cluster", f"RAY_ADDRESS={address}" if address else "none set: one is started per command")
    mode = os.environ.get("RAY_AUTH_MODE")
    token = _token()
    if mode not in (None, "token", "disabled"):
        advice = "RAY_AUTH_MODE is either token or disabled"
        yield Finding("ray", "token authentication", f"RAY_AUTH_MODE={mode}", "fail", advice)
    elif mode == "disabled":
        advice = "whoever reaches the cluster's ports can run code: keep it to this machine or a closed network"
        yield Finding("ray", "token authentication", "disabled by RAY_AUTH_MODE", "warn" if address else "ok", advice)
    elif address and token is None:
        advice = "the cluster may ask for its token: put it into ~/.ray/auth_token, or set RAY_AUTH_TOKEN"
        yield Finding("ray", "token authentication", "on (Ray's default), no token here", "warn", advice)
    else:
        yield Finding("ray", "token authentication", f"on (Ray's default), {token or 'Ray makes a token when needed'}")
    yield from _open_files()


def _token() -> str | None:
    """Where Ray would find its token, in Ray's order; None where there is none."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "token from RAY_AUTH_TOKEN"
    places = filter(None, (os.environ.get("RAY_AUTH_TOKEN_PATH"), str(Path.home() / ".ray" / "auth_token")))
    return next((f"token from {place}" for place in places if Path(place).is_file()), None)


def _open_files() -> Iterator[Finding]:
    try:
        import resource
    except ImportError:  # not on this system
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    best = hard if hard != resource.RLIM_INFINITY else 2**20
    if best < 4096:
        yield Finding("ray", "open files", f"at most {best}", "warn", "Ray wants 65536: raise it with ulimit -n")
    else:
        yield Finding("ray", "open files", f"{soft}, Ray may raise it to {best}")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


_MARKS = {"ok": "[green]ok[/green]", "warn": "[yellow]warn[/yellow]", "fail": "[bold red]FAIL[/bold red]"}


def _print(found: list[Finding]) -> None:
    table = Table(title="unimoe doctor", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "what", "found", "what to do"):
        table.add_column(column, overflow="fold")
    group = found[0].group
    for item in found:
        if item.group != group:
            table.add_section()
            group = item.group
        table.add_row(_MARKS[item.level], item.name, item.value, item.advice)
    console = Console()
    console.print(table)
    counts = {level: sum(item.level == level for item in found) for level in _MARKS}
    if counts["fail"]:
        verdict = f"{counts['fail']} to repair before anything runs"
    elif counts["warn"]:
        verdict = f"ready; {counts['warn']} worth a look"
    else:
        verdict = "ready"
    console.print(f"\n{verdict}", highlight=False)
