"""What rank 0 writes down of a run: a line per step, findings, and metrics that Ray exports for Prometheus."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.util.metrics import Counter, Gauge

from unimoe_ray.config import Config
from unimoe_ray.training.recovery import METRICS, Account
from unimoe_ray.training.routing import idle_experts
from unimoe_ray.training.watch import Finding, Watch

# Series of Prometheus that one run may have for its experts; a larger model has those of its layers only.
MAX_SERIES = 4096
FINDINGS = "findings.jsonl"


class RunRecord:
    """One run's part of ``metrics.jsonl`` and ``findings.jsonl``, from the step after ``done`` on."""

    def __init__(self, config: Config, run: str, done: int = 0):
        self._folder = config.run_dir
        self._account = Account(self._folder, run, done)
        self._watch = Watch(config.training.watch, config.model.moe.slots, config.model.moe.top_k)
        self._exported = TrainingMetrics(run, config.model.moe.slots)
        self._idle: list[list[int]] = []
        self._run = run
        for line in drop_after(self._folder, run, done):
            self._watch.step(line)  # what it says now was said then
            self._idle = line.get("dead_experts", [])

    def write(self, line: dict[str, Any]) -> None:
        """A finished step."""
        if line["expert_load"] is not None:
            self._idle = idle_experts(line, self._idle)
            line = line | {"dead_experts": self._idle}
        line = line | self._account.line(line["seconds"]) | {"time": round(time.time(), 3)}
        _append(self._folder / METRICS, line)
        self._exported.step(line)
        findings = self._watch.step(line)
        if skipped := line.get("skipped"):
            text = f"the step was left out: {skipped}"
            findings.append(Finding(line["run"], line["step"], "skipped", line["step"], text))
        for finding in findings:
            _append(self._folder / FINDINGS, finding.line() | {"stage": line["stage"], "time": line["time"]})
            if not finding.over:
                self._exported.finding(finding.signature)

    def remark(self, step: int, text: str) -> None:
        """Something about the states of the run that its user should know."""
        line = {"run": self._run, "step": step, "signature": "checkpoint", "since": step, "text": text, "over": False}
        _append(self._folder / FINDINGS, line | {"stage": self._run.partition("/")[0], "time": round(time.time(), 3)})


class TrainingMetrics:
    """Of one run, labelled with it; layers count from 0 and experts have their slots' names, as in serving."""

    def __init__(self, run: str, experts: list[str]):
        self._run, self._experts = run, [f"{number}-{name}" for number, name in enumerate(experts)]
        gauges = {
            "loss": "Mean over answer tokens of the last step.",
            "lr": "Highest learning rate of the last step.",
            "tokens_per_s": "Tokens of the last step by its time.",
            "step": "Steps done.",
            "goodput": "Time in steps that count over the time since the run began.",
            "restarts": "How often the run's workers went on where others had stopped.",
            "lost_steps": "Steps that were done again.",
            "world": "Workers.",
        }
        self._gauges = {name: _gauge(name, text) for name, text in gauges.items()}
        layers = {
            "router_entropy": "Mean entropy of the router, in nats.",
            "busiest_share": "Share of tokens whose first choice is the busiest expert.",
            "load_cv": "Coefficient of variation of the expert loads.",
        }
        self._layers = {name: _gauge(name, text, "layer") for name, text in layers.items()}
        self._load = _gauge("expert_load", "Share of a layer's routed slots in the last step.", "layer", "expert")
        self._validation = _gauge("validation_loss", "Mean over answer tokens of the last validation.", "group")
        self._tokens = _counter("expert_tokens", "Routed slots by modality.", "kind", "layer", "expert")
        self._recovery = _gauge("recovery_seconds", "From the last stop of workers to the next new step.", "cause")
        self._pause = _gauge("checkpoint_pause_seconds", "That the steps waited for the last state to be copied.")
        self._findings = _counter("findings", "What the watch remarked on.", "signature")

    def step(self, line: dict[str, Any]) -> None:
        """A line of ``metrics.jsonl``."""
        for name, gauge in self._gauges.items():
            gauge.set(line[name], self._tags())
        for group, loss in line.get("validation", {}).items():
            self._validation.set(loss, self._tags(group=group))
        if written := line.get("checkpoint"):
            self._pause.set(written["wait_s"] + written["copy_s"], self._tags())
        if recovery := line.get("recovery"):
            self._recovery.set(recovery["seconds"], self._tags(cause=recovery["cause"]))
        if line["expert_load"] is None:
            return
        for name, gauge in self._layers.items():
            for layer, value in enumerate(line[name]):
                gauge.set(value, self._tags(layer=str(layer)))
        layers, experts, kinds = len(line["expert_load"]), len(self._experts), len(line["expert_tokens"])
        if layers * experts * (kinds + 1) > MAX_SERIES:
            return
        for layer, shares in enumerate(line["expert_load"]):
            for expert, share in zip(self._experts, shares, strict=True):
                self._load.set(share, self._tags(layer=str(layer), expert=expert))
        for kind, counts in line["expert_tokens"].items():
            for layer, row in enumerate(counts):
                for expert, tokens in zip(self._experts, row, strict=True):
                    if tokens:
                        self._tokens.inc(tokens, self._tags(kind=kind, layer=str(layer), expert=expert))

    def finding(self, signature: str) -> None:
        self._findings.inc(tags=self._tags(signature=signature))

    def _tags(self, **more: str) -> dict[str, str]:
        return {"run": self._run} | more


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(f"unimoe_train_{name}", f"Training: {text}", ("run", *labels))


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(f"unimoe_train_{name}_total", f"Training: {text}", ("run", *labels))


def drop_after(run_dir: Path, run: str, step: int) -> list[dict[str, Any]]:
    """Drop what a run wrote of the steps after ``step``, which it does again. Returns its lines of the others, one for
    each step."""
    for name in (METRICS, FINDINGS):
        path = run_dir / name
        if path.is_file():
            with _alone(path):
                lines = path.read_bytes().splitlines(keepends=True)
                left = [line for line in lines if _stays(line, run, step)]
                if left != lines:
                    temporary = path.with_name(f".{name}.new")
                    temporary.write_bytes(b"".join(left))
                    temporary.replace(path)
    path = run_dir / METRICS
    lines = path.read_bytes().splitlines() if step and path.is_file() else []
    return [parsed for line in lines if (parsed := _parse(line)) and parsed.get("run") == run]


def _stays(line: bytes, run: str, step: int) -> bool:
    """A line that was cut off by a crash does not."""
    parsed = _parse(line)
    return line.endswith(b"\n") and parsed is not None and (parsed.get("run") != run or parsed["step"] <= step)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        parsed = json.loads(line)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) and isinstance(parsed.get("step"), int) else None


def _append(path: Path, line: dict[str, Any]) -> None:
    with _alone(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Runs side by side write to one file, and one that starts again makes it anew."""
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
