"""Prometheus metrics of the deployments, and one page of them for the whole cluster.

Ray exports them from every node with the prefix ``ray_``; Serve adds the labels deployment, replica and application.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import aiohttp
import numpy as np
import ray
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from ray.serve.metrics import Counter, Gauge, Histogram

from unimoe_ray.inference.request import KINDS

SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]
SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
PREFIXES = ("ray_unimoe_", "ray_serve_")
NOISE = ("Component", "SessionName", "Version")


class IngressMetrics:
    def __init__(self) -> None:
        self._requests = Counter("unimoe_requests_total", "Answers by HTTP status.", ("status",))
        self.retries = Counter("unimoe_retries_total", "Requests that went on elsewhere because a replica ended.")
        self.ttft = Histogram("unimoe_ttft_seconds", "From the arrival of a request to its first token.", SECONDS)
        self.inter_token = Histogram("unimoe_inter_token_seconds", "Between two tokens of an answer.", SECONDS)
        self._cache = Counter("unimoe_embedding_cache_total", "Media by kind and outcome.", ("kind", "outcome"))
        self._cache_bytes = Gauge("unimoe_embedding_cache_bytes", "Soft tokens kept for reuse.")

        self._fallbacks = Counter(
            "unimoe_encoder_fallbacks_total", "Files that no encoder replica took, by kind.", ("kind",)
        )

    def fallback(self, kind: str) -> None:
        self._fallbacks.inc(tags={"kind": kind})

    def answered(self, status: int) -> None:
        self._requests.inc(tags={"status": str(status)})

    def cache(self, kind: str, hit: bool, nbytes: int) -> None:
        self._cache.inc(tags={"kind": kind, "outcome": "hit" if hit else "miss"})
        self._cache_bytes.set(nbytes)


class EncoderMetrics:
    def __init__(self) -> None:
        self._files = Counter("unimoe_encoded_files_total", "Media files that went through a tower.", ("kind",))
        self.batch_files = Histogram("unimoe_encoder_batch_files", "Files of one batch.", SIZES)
        self.batch_cost = Histogram("unimoe_encoder_batch_cost", "Cost of one batch (frames or seconds).", SIZES)
        self.queue = Histogram("unimoe_encoder_queue_seconds", "From a file's arrival to its batch.", SECONDS)
        self.seconds = Histogram("unimoe_encoder_batch_seconds", "Tower and connector, one batch.", SECONDS)

    def encoded(self, kinds: list[str]) -> None:
        for kind in set(kinds):
            self._files.inc(kinds.count(kind), tags={"kind": kind})


@dataclass
class LanguageMetrics:
    """Fed once a second from the engine's own counters, so that a step pays for none of it."""

    experts: tuple[str, ...]
    _seen: dict[str, int] = field(default_factory=dict)
    _seen_load: np.ndarray | None = None

    def __post_init__(self) -> None:
        names = ("prompt_tokens", "generated_tokens", "steps", "finished", "cancelled")
        self._counters = {name: Counter(f"unimoe_{name}_total", f"Engine: {name}.") for name in names}
        gauges = ("running", "waiting", "kv_tokens", "kv_tokens_used")
        self._gauges = {name: Gauge(f"unimoe_engine_{name}", f"Engine: {name}.") for name in gauges}
        self._queue = Histogram("unimoe_engine_queue_seconds", "From arrival to the first step.", SECONDS)
        self._batch = Histogram("unimoe_engine_step_tokens", "Tokens of one step.", SIZES)
        labels = ("kind", "layer", "expert")
        self._experts = Counter("unimoe_expert_tokens_total", "Routed slots by modality, sparse layer, expert.", labels)

    def update(self, stats: dict[str, int], load: np.ndarray, queue: list[float], steps: list[int]) -> None:
        for name, counter in self._counters.items():
            if more := stats[name] - self._seen.get(name, 0):
                counter.inc(more)
            self._seen[name] = stats[name]
        for name, gauge in self._gauges.items():
            gauge.set(stats[name])
        for seconds in queue:
            self._queue.observe(seconds)
        for tokens in steps:
            self._batch.observe(tokens)
        before = np.zeros_like(load) if self._seen_load is None else self._seen_load
        for kind, layer, expert in np.argwhere(load > before).tolist():
            tags = {"kind": KINDS[kind], "layer": str(layer), "expert": self.experts[expert]}
            self._experts.inc(int(load[kind, layer, expert] - before[kind, layer, expert]), tags=tags)
        self._seen_load = load


async def cluster_metrics(timeout_s: float = 3.0) -> bytes:
    """Our metrics and Serve's, of all nodes, in Prometheus' text format. A node that does not answer is left out."""
    nodes = [node for node in await asyncio.to_thread(ray.nodes) if node["Alive"] and node.get("MetricsExportPort")]
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(timeout_s)) as session:
        urls = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]
        pages = await asyncio.gather(*(_get(session, url) for url in urls))
    merged: dict[str, Metric] = {}
    for family in (family for page in pages for family in text_string_to_metric_families(page)):
        if family.name.startswith(PREFIXES):
            samples = [sample._replace(labels=_ours(sample.labels)) for sample in family.samples]
            family.samples = []
            merged.setdefault(family.name, family).samples += samples
    return generate_latest(_Merged(list(merged.values())))


def _ours(labels: dict[str, str]) -> dict[str, str]:
    """Labels but those of Ray's exporter, the same everywhere."""
    return {name: value for name, value in labels.items() if not name.startswith("otel_") and name not in NOISE}


@dataclass
class _Merged:
    """What ``generate_latest`` takes as a registry."""

    families: list[Metric]

    def collect(self) -> list[Metric]:
        return self.families


async def _get(session: aiohttp.ClientSession, url: str) -> str:
    try:
        async with session.get(url) as answer:
            return await answer.text()
    except (aiohttp.ClientError, TimeoutError):
        return ""
