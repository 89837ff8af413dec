"""Ratios out of the JSON lines that the benchmarks print, their comparison with earlier ones, and their table.

Only ratios are compared: both sides of one come from the same run, so a slower machine does not change them much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Ratio:
    """name: within its benchmark; against: what the value is relative to; tolerance: a change for the worse by more
    than this part of the earlier value is a regression; target: what was promised of it at full size, if anything."""

    name: str
    value: float
    against: str
    better: Literal["higher", "lower"]
    tolerance: float
    target: float | None = None


def _moe_block(record: dict) -> Iterator[Ratio]:
    cases: dict[str, dict[str, dict]] = {}
    for line in record["results"]:
        cases.setdefault(line["case"], {})[line["name"]] = line
    for case, lines in cases.items():
        ours = lines.pop("ours")
        yield Ratio(f"{case}, speed", ours["of_dense"], "dense of the same active FLOPs", "higher", 0.25)
        yield Ratio(f"{case}, speed", ours["of_ceiling"], "ceiling", "higher", 0.25)
        for name, line in lines.items():
            if name not in ("ceiling", "dense, same active FLOPs"):
                value = round(ours["of_dense"] / line["of_dense"], 3)
                yield Ratio(f"{case}, speed", value, name, "higher", 0.35)


def _expert_parallel(record: dict) -> Iterator[Ratio]:
    for line in record["results"]:
        name = f"{line['experts']} experts, {line['routing']}, CPU time"
        yield Ratio(name, line["ratio"], "DeepSpeed's layer", "lower", 0.3)


def _overhead(record: dict) -> Iterator[Ratio]:
    for line in record["results"]:
        yield Ratio(f"{line['workers']} workers, CPU time", line["cpu_ratio"], "bare loop", "higher", 0.25)


def _serving(record: dict) -> Iterator[Ratio]:
    for size in (size for size in record.values() if isinstance(size, dict) and "limit" in size):
        for peer, counts in size.items():
            for count, row in counts.items() if peer not in ("ours", "limit", "equal") else ():
                yield Ratio(f"{count} requests, tokens/s", row["ours_over_it"], peer, "higher", 0.3)
        for count, limit in size["limit"].items():
            share = size["ours"][count]["tokens_per_s"] / limit
            yield Ratio(f"{count} requests, tokens/s", round(share, 3), "memory-bandwidth limit", "higher", 0.4)


def _endpoint(record: dict) -> Iterator[Ratio]:
    for size, figures in record["sizes"].items():
        over = figures["endpoint_over_bare"]
        yield Ratio(f"{size}, tokens/s", over["tokens_per_s"], "bare uvicorn app", "higher", 0.3, 0.85)
        yield Ratio(f"{size}, TTFT", over["ttft"], "bare uvicorn app", "lower", 0.5, 2.0)
        for kind, value in figures["cached_over_new_ttft"].items():
            yield Ratio(f"{size}, TTFT of a cached {kind}", value, "new one", "lower", 0.5, 0.4)


def _data(record: dict) -> Iterator[Ratio]:
    for name, row in record["cpu"].items():
        if name != "plain loop":
            yield Ratio(f"{name}, CPU time", round(row["ratio"], 3), "plain loop", "lower", 0.3)
    memory = record["memory"]
    for name, small in memory["small"].items():
        yield Ratio(f"{name}, memory", round(memory["large"][name] / small, 3), "a tenth of the files", "lower", 0.15)


def _placement(record: dict) -> Iterator[Ratio]:
    for title, strategies in record["scenarios"].items():
        for name, row in strategies.items():
            yield Ratio(f"{title}, {name}: slowest rank", round(row["later"], 4), "mean of the ranks", "lower", 0.02)


def _batches(record: dict) -> Iterator[Ratio]:
    for row in record["fill"]:
        if row["order"] != "naive" and row["samples"] == "llava":
            name = f"{row['batch']} samples, {row['world']} ranks, {row['max_tokens']} tokens, {row['order']}"
            yield Ratio(name, round(row["full"], 4), "all places filled", "higher", 0.02)


def _precision(record: dict) -> Iterator[Ratio]:
    for name, row in record["figures"].items():
        if name != "fp32":
            yield Ratio(f"{name}, speed", round(row["faster"], 3), "fp32", "higher", 0.3)


def _lookup(record: dict) -> Iterator[Ratio]:
    for name, row in record["figures"].items():
        text, requests = name.split()
        title = f"text '{text}', {requests} requests, tokens/s"
        yield Ratio(title, round(row["ratio"], 3), "no guesses", "higher", 0.3)


def _recovery(record: dict) -> Iterator[Ratio]:
    yield Ratio("ours of the whole pause", round(record["ours_s"] / record["whole_s"], 3), "whole", "lower", 0.5)


def _sparse(record: dict) -> Iterator[Ratio]:
    for peer, ratios in record["mixture_over"].items():
        for name in (name for name in ratios if "tokens/s" in name):
            yield Ratio(name, ratios[name], peer, "higher", 0.25)
        for name in ("FLOPs", "parameters"):
            yield Ratio(name, ratios[name], peer, "lower", 0.001)


FIGURES: dict[str, Callable[[dict], Iterator[Ratio]]] = {
    "batches": _batches,
    "data": _data,
    "endpoint": _endpoint,
    "expert_parallel": _expert_parallel,
    "lookup": _lookup,
    "moe_block": _moe_block,
    "overhead": _overhead,
    "placement": _placement,
    "precision": _precision,
    "recovery": _recovery,
    "serving": _serving,
    "sparse": _sparse,
}


def ratios(name: str, record: dict) -> list[dict[str, Any]]:
    """Of a benchmark's JSON line; none for a benchmark without such."""
    return [asdict(ratio) for ratio in FIGURES.get(name, lambda record: iter(()))(record)]


def compare(baseline: dict, now: dict) -> tuple[list[str], list[str]]:
    """(regressions, what could not be compared), a line each, of two results of ``run.py``."""
    worse, skipped = [], []
    for name, before in baseline["benchmarks"].items():
        after = now["benchmarks"].get(name, {"state": "left out", "reason": "not run"})
        if before["state"] != "done":
            continue
        if after["state"] == "failed":
            worse.append(f"{name}: fails now: {after['reason']}")
            continue
        if after["state"] == "left out":
            skipped.append(f"{name}: {after['reason']}")
            continue
        found = {(ratio["name"], ratio["against"]): ratio["value"] for ratio in after["ratios"]}
        for ratio in before["ratios"]:
            title = f"{name}: {ratio['name']} over {ratio['against']}"
            value = found.get((ratio["name"], ratio["against"]))
            if value is None:
                skipped.append(f"{title}: not measured now")
                continue
            factor = 1 + ratio["tolerance"] * (1 if ratio["better"] == "lower" else -1)
            bound = ratio["value"] * factor
            if value > bound if ratio["better"] == "lower" else value < bound:
                word = "at most" if ratio["better"] == "lower" else "at least"
                worse.append(f"{title}: {value:g}, was {ratio['value']:g}; allowed: {word} {bound:.4g}")
    return worse, skipped


def table(result: dict) -> str:
    """The page ``RESULTS.md``."""
    lines = [
        "# Benchmarks at small sizes",
        "",
        "Written by `make bench`; `make bench-check` compares ratios with it. Small sizes show whether something is",
        "slower beside its peers, not how fast it is: that is in the pages of the benchmarks, measured at full size.",
        "",
        f"{result['date']}, commit {result['commit']}, {result['machine']['cpu']}, {result['machine']['cores']} cores, "
        f"load at the start {result['machine']['load']:.1f}.",
    ]
    for name, run in result["benchmarks"].items():
        lines += ["", f"## {name}", "", f"`{run['command']}`"]
        if run["state"] != "done":
            lines += ["", f"{run['state']}: {run['reason']}"]
            continue
        lines += ["", *(f"{note}\n" for note in run["notes"])]
        if run["ratios"]:
            lines += ["| figure | ratio | to | better | target at full size |", "|---|---|---|---|---|"]
        for ratio in run["ratios"]:
            target = "" if ratio["target"] is None else f"{ratio['target']:g}"
            lines.append(
                f"| {ratio['name']} | {ratio['value']:.3g} | {ratio['against']} | {ratio['better']} | {target} |"
            )
    return "\n".join(lines) + "\n"
