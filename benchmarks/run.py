"""All benchmarks at a small size, each in a process of its own: results/bench.json, RESULTS.md and a plot.

    python benchmarks/run.py                       all of them
    python benchmarks/run.py --only sparse serving
    python benchmarks/run.py --check               compare ratios with results/bench.json instead of writing it;
                                                   a line per regression, exit code 1 if there is one

What is a benchmark: a file of this folder that can be started. Its last line of output is its result, as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
RESULTS = FOLDER / "results" / "bench.json"
LIMIT_S = 420.0
sys.path.insert(0, str(ROOT))

from benchmarks.figures import compare, ratios, table  # noqa: E402


def find() -> dict[str, list[str]]:
    """Arguments of each benchmark at a small size."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "__main__" in text and path.stem not in ("run", "serving_engines"):
            found[path.stem] = ["--small"] if '"--small"' in text else []
    return found


def run(name: str, arguments: list[str], limit_s: float) -> dict:
    command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments]
    shown = " ".join(["python", f"benchmarks/{name}.py", *arguments])
    about = {"command": shown, "seconds": 0.0, "notes": [], "ratios": [], "record": {}}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        if name == "placement":  # Its page is of the full size, too, but a check writes nothing.
            command.append(scratch)
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            about["seconds"] = limit_s
            return about | {"state": "failed", "reason": f"not done within {limit_s:g} s"}
        finally:  # Ctrl-C and SIGTERM reach this process alone.
            if process.poll() is None:
                stop(process)
    about["seconds"] = round(time.monotonic() - begun, 1)
    about["notes"] = [line.strip() for line in (out + err).splitlines() if "left out" in line]
    if process.returncode:
        reason = next(reversed([line.strip() for line in (err or out).splitlines() if line.strip()]), "no output")
        missing = re.search(r"No module named '(\w+)'", reason)
        if missing and not (ROOT / missing.group(1)).exists():
            return about | {"state": "left out", "reason": f"{missing.group(1)} is not installed"}
        return about | {"state": "failed", "reason": reason}
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if not lines:
        return about | {"state": "failed", "reason": "no line of JSON at its end"}
    record = json.loads(lines[-1])
    return about | {"state": "done", "reason": "", "ratios": ratios(name, record), "record": record}


def stop(process: subprocess.Popen) -> None:
    """And what it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(process.pid, number)
        try:
            process.communicate(timeout=30)
            return
        except subprocess.TimeoutExpired:
            continue


def machine() -> dict:
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = re.findall(r"model name\s*: (.*)", info.read_text())
        cpu = names[0] if names else cpu
    return {"cpu": cpu, "cores": os.cpu_count(), "load": os.getloadavg()[0]}


def commit() -> str:
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    done = subprocess.run(asked, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def plot(result: dict, path: Path) -> None:
    """Every ratio as a bar from 1, for the better in one colour, for the worse in another."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "bench", "svg.fonttype": "none"}
    import matplotlib.pyplot as plt

    bars = [
        (f"{name}: {ratio['name']} / {ratio['against']}", ratio["value"], ratio["better"])
        for name, run in result["benchmarks"].items()
        for ratio in run["ratios"]
        if name != "placement" and ratio["value"] > 0
    ]
    if not bars:
        return
    figure, axes = plt.subplots(figsize=(9, 1 + 0.18 * len(bars)))
    good = [(value >= 1) == (better == "higher") for _, value, better in bars]
    colours = ["#2a7f62" if is_good else "#b5553c" for is_good in good]
    axes.barh(range(len(bars)), [value - 1 for _, value, _ in bars], left=1, color=colours)
    axes.set_yticks(range(len(bars)), [title for title, _, _ in bars], fontsize=6)
    axes.set_ylim(-1, len(bars))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("ratio; green: on the better side of 1")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    known = find()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=known, metavar="NAME", help=", ".join(known))
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="of each benchmark")
    args = parser.parse_args()
    if args.check and not RESULTS.is_file():
        print(f"there is no {RESULTS.relative_to(ROOT)} to compare with: make bench writes it", file=sys.stderr)
        return 2
    result = {"commit": commit(), "date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(), "benchmarks": {}}
    for name in args.only or known:
        done = result["benchmarks"][name] = run(name, known[name], args.limit_s)
        print(f"{name:18}{done['state']:10}{done['seconds']:7.0f} s  {done['reason']}", flush=True)
        for note in done["notes"]:
            print(f"{'':18}{note}")
    if args.check:
        baseline = json.loads(RESULTS.read_text(encoding="utf-8"))
        if args.only:
            baseline["benchmarks"] = {k: v for k, v in baseline["benchmarks"].items() if k in args.only}
        worse, skipped = compare(baseline, result)
        for line in skipped:
            print(f"not compared: {line}")
        for line in worse:
            print(f"regression: {line}")
        return 1 if worse else 0
    if args.only and RESULTS.is_file():
        others = json.loads(RESULTS.read_text(encoding="utf-8"))["benchmarks"]
        result["benchmarks"] = dict(sorted((others | result["benchmarks"]).items()))
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (FOLDER / "RESULTS.md").write_text(table(result) + "\n![ratios](results/bench.svg)\n", encoding="utf-8")
    plot(result, FOLDER / "results" / "bench.svg")
    return 1 if any(done["state"] == "failed" for done in result["benchmarks"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
