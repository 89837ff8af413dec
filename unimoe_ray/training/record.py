"""What rank 0 writes down of a run: a line per step, findings, and metrics that Ray exports for Prometheus."""

from __future__ import annotations

import time
from typing import Any

from ray.util.metrics import Counter, Gauge

from unimoe_ray.config import Config
from unimoe_ray.training.recovery import METRICS, Account, append
from unimoe_ray.training.routing import idle_experts
from unimoe_ray.training.watch import Finding, Watch

# Series of Prometheus that one run may have for its experts; a larger model has those of its layers only.
MAX_SERIES = 4096


class RunRecord:
    """One run's part of ``metrics.jsonl`` and ``findings.jsonl``."""

    def __init__(self, config: Config, run: str, resumed: int = 0):
        """``resumed``: steps that were done before, by earlier workers."""
        self._folder = config.run_dir
        self._account = Account(self._folder, run, resumed)
        self._watch = Watch(config.training.watch, config.model.moe.slots, config.model.moe.top_k)
        self._exported = TrainingMetrics(run, config.model.moe.slots)
        self._idle: list[list[int]] = []
        for line in self._account.earlier:
            self._idle = line.get("dead_experts", [])
            self._watch.step(line)

    def write(self, line: dict[str, Any]) -> None:
        """A finished step."""
        if line["expert_load"] is not None:
            self._idle = idle_experts(line, self._idle)
            line = line | {"dead_experts": self._idle}
        line = line | self._account.line(line["seconds"]) | {"time": round(time.time(), 3)}
        append(self._folder / METRICS, line)
        self._exported.step(line)
        findings = self._watch.step(line)
        if skipped := line.get("skipped"):
            text = f"the step was left out: {skipped}"
            findings.append(Finding(line["run"], line["step"], "skipped", line["step"], text))
        for finding in findings:
            append(self._folder / "findings.jsonl", finding.line() | {"stage": line["stage"], "time": line["time"]})
            if not finding.over:
                self._exported.finding(finding.signature)


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
            "restarts": "Starts of the run's workers after the first.",
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
        self._findings = _counter("findings", "What the watch remarked on.", "signature")

    def step(self, line: dict[str, Any]) -> None:
        """A line of ``metrics.jsonl``."""
        for name, gauge in self._gauges.items():
            gauge.set(line[name], self._tags())
        for group, loss in line.get("validation", {}).items():
            self._validation.set(loss, self._tags(group=group))
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
