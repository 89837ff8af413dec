"""Run the tests marked slow one by one, each in its own process, and remember which passed.

A run that was stopped goes on where it was; a test runs again when a source file changed since it passed.

    python tests/run_slow.py [--part K/N] [--seconds S] [--list]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAMPS = ROOT / ".slow"
SOURCES = ("unimoe_ray", "jobs", "serve", "tests", "k8s", "benchmarks", "pyproject.toml", "constraints.txt")


def collect() -> list[str]:
    """Node ids of the slow tests, in the order of collection."""
    command = [sys.executable, "-m", "pytest", "-m", "slow", "--collect-only", "-q", "--no-header"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if result.returncode not in (0, 5):  # 5: there are none
        sys.exit(f"collecting the slow tests failed:\n{result.stdout}{result.stderr}")
    return [line for line in result.stdout.splitlines() if "::" in line and not line.startswith(" ")]


def source_hash() -> str:
    digest = hashlib.sha256()
    for name in SOURCES:
        top = ROOT / name
        files = [top] if top.is_file() else sorted(p for p in top.rglob("*") if p.is_file())
        for path in files:
            if "__pycache__" not in path.parts:
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def run_one(node: str, seconds: float | None) -> int | None:
    """Exit code of one test, or None when the time limit ended it."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", node]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        return process.wait(seconds)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as stopped:
        # An interrupt first, so that fixtures shut their clusters down.
        for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            os.killpg(process.pid, sig)
            try:
                process.wait(30)
                break
            except subprocess.TimeoutExpired:
                continue
        if isinstance(stopped, KeyboardInterrupt):
            sys.exit("interrupted: run it again to go on")
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="0/1", metavar="K/N", help="every Nth test, starting at the Kth")
    parser.add_argument("--seconds", type=float, help="start no test and let none run after this many seconds")
    parser.add_argument("--list", action="store_true", help="print the tests, run none")
    args = parser.parse_args()
    part, parts = map(int, args.part.split("/"))
    tests = collect()[part::parts]
    if args.list or not tests:
        print("\n".join(tests) or "no slow test in this part")
        return 0

    start = time.monotonic()
    source = source_hash()
    STAMPS.mkdir(exist_ok=True)
    passed, failed, skipped, unfinished = 0, [], 0, []
    for number, node in enumerate(tests, 1):
        stamp = STAMPS / hashlib.sha256(f"{source} {node}".encode()).hexdigest()[:24]
        left = None if args.seconds is None else args.seconds - (time.monotonic() - start)
        if stamp.exists():
            skipped += 1
            print(f"[{number}/{len(tests)}] {node}: passed before", flush=True)
            continue
        if left is not None and left <= 0:
            unfinished.append(node)
            continue
        print(f"[{number}/{len(tests)}] {node}", flush=True)
        code = run_one(node, left)
        if code == 0:
            passed += 1
            stamp.write_text(node + "\n")
        elif code is None:
            unfinished.append(node)
        else:
            failed.append(node)
    for node in unfinished:
        print(f"not finished within {args.seconds:g} s: {node}")
    for node in failed:
        print(f"FAILED {node}")
    print(f"slow tests: {passed} passed, {skipped} passed before, {len(failed)} failed, {len(unfinished)} unfinished")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
