"""Real Ray Train runs on a tiny model: side by side, delivered by Ray Data, resumed by stage."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from statistics import median

import pytest
import ray
import requests
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from tests.tiny import TinyRun
from unimoe_ray import cluster
from unimoe_ray.data import prepare
from unimoe_ray.data.loader import Layout, planned_micro_batches
from unimoe_ray.data.plan import Order
from unimoe_ray.pipeline import follow_runs
from unimoe_ray.progress import TrainProgress
from unimoe_ray.training.checkpoint import checkpoint_dir, is_complete, load_model
from unimoe_ray.training.trainer import run_stage

TUNE_STEPS = 48
VALIDATED = [20, 40, 48]
SLOTS = ["base", "image", "speech", "audio"]
LABELS = {"run", "layer", "expert", "kind", "group", "signature"}


def _run(run: TinyRun, stage: str, workers: int, follow: Callable[..., None] = lambda *_: None) -> list[str]:
    source = prepare.source(run.config, "train")
    return run_stage(run.config, stage, run.info, source, run.tokenizer, workers=workers, use_gpu=False, follow=follow)


def _exported(seen: dict[tuple[str, tuple], float]) -> None:
    """Add what the nodes export of training now: {(name, labels): value}."""
    for node in ray.nodes():
        try:
            address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            page = requests.get(address, timeout=5).text
        except (
            requests.RequestException
        ):  # the exporter starts some seconds after its node, and may have to wait for a core
            continue
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if sample.name.startswith("ray_unimoe_train_"):
                    ours = {k: v for k, v in sample.labels.items() if k in LABELS}
                    seen[sample.name.removeprefix("ray_unimoe_train_"), tuple(sorted(ours.items()))] = sample.value


def _metrics(run: TinyRun) -> list[dict]:
    return [json.loads(line) for line in (run.config.run_dir / "metrics.jsonl").read_text().splitlines()]


def _check_what_was_said(run: TinyRun, lines: list[dict], exported: dict[tuple[str, tuple], float], shown: str) -> None:
    """The router's rate is far too high: the run's own lines show it, file and terminal say it, Ray exports it."""
    findings = [json.loads(line) for line in (run.config.run_dir / "findings.jsonl").read_text().splitlines()]
    said = Counter(finding["signature"] for finding in findings if not finding["over"])
    assert said["collapse"] and {finding["run"] for finding in findings} == {"tune"}
    collapse = next(finding for finding in findings if finding["signature"] == "collapse")
    (expert,), layer = collapse["experts"], collapse["layer"]
    for line in lines[collapse["since"] - 1 : collapse["step"]]:
        assert line["busiest_share"][layer] >= 0.9
    assert f"layer {layer + 1} sends" in collapse["text"] and f"expert {expert} ({SLOTS[expert]})" in collapse["text"]
    assert f"tune, step {collapse['step']}: {collapse['text']}\n" in shown and "tune            100 %" in shown
    assert [line["step"] for line in lines if "validation" in line] == VALIDATED
    assert lines[19]["validation"].keys() == {"text", "image", "video", "audio", "speech", "image+speech"}

    def value(name: str, **labels: str) -> float:
        return exported[name, tuple(sorted({"run": "tune", **labels}.items()))]

    # What is exported may lag behind the end of the run by some steps, and be caught while a step is written down.
    step = int(value("step"))
    assert TUNE_STEPS // 2 < step <= TUNE_STEPS
    near = lines[step - 2 : step + 1]
    for name in ("loss", "lr", "tokens_per_s"):
        assert value(name) in [line[name] for line in near]
    assert value("validation_loss", group="speech") in [lines[n - 1]["validation"]["speech"] for n in VALIDATED]
    assert value("findings_total", signature="collapse") == said["collapse"]
    for layer in range(2):
        for name in ("router_entropy", "busiest_share", "load_cv"):
            assert value(name, layer=str(layer)) in [line[name][layer] for line in near]
        for number, slot in enumerate(SLOTS):
            labels = {"layer": str(layer), "expert": f"{number}-{slot}"}
            assert value("expert_load", **labels) in [line["expert_load"][layer][number] for line in near]
            routed = list(accumulate(line["expert_tokens"]["text"][layer][number] for line in lines))
            assert value("expert_tokens_total", kind="text", **labels) in routed[step - 2 : step + 1]


@pytest.mark.timeout(600)
def test_stages_on_a_real_cluster(tiny_run, monkeypatch):
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "500")
    training, tune = tiny_run.config.training, tiny_run.config.stages.tune["tune"]
    training.validation.every, training.validation.samples = 20, 4
    training.watch.patience, tune.train["router"], tune.steps = 6, 0.1, TUNE_STEPS
    exported: dict[tuple[str, tuple], float] = {}
    with cluster.connect(tiny_run.config):
        # Stage 2: three runs side by side, one worker each.
        assert _run(tiny_run, "experts", workers=2) == ["experts/image", "experts/speech", "experts/audio"]
        lines = _metrics(tiny_run)
        times = {label: [x["time"] for x in lines if x["run"] == label] for label in {x["run"] for x in lines}}
        assert {len(t) for t in times.values()} == {3}
        # What is finished is not done again; what was damaged is.
        assert _run(tiny_run, "experts", workers=2) == []
        damaged = checkpoint_dir(tiny_run.config.run_dir, "experts", "speech") / "model.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x00")
        assert not is_complete(damaged.parent)
        assert _run(tiny_run, "experts", workers=2) == ["experts/speech"]

        # Stage 3: two workers on one run.
        console = Console(file=io.StringIO(), width=400)
        show = follow_runs(tiny_run.config.run_dir, TrainProgress(console))

        def follow(*given) -> None:
            show(*given)
            _exported(exported)

        assert _run(tiny_run, "tune", workers=2, follow=follow) == ["tune"]
    lines = [x for x in _metrics(tiny_run) if x["run"] == "tune"]
    assert [x["step"] for x in lines] == list(range(1, TUNE_STEPS + 1))
    assert all(x["world"] == 2 and x["samples"] == 8 for x in lines)
    # Steps are delivered before they are wanted.
    assert median(x["data_wait_s"] for x in lines) <= 0.02 * median(x["seconds"] for x in lines)
    assert all(sum(layer) == pytest.approx(1, abs=1e-3) for x in lines for layer in x["expert_load"])
    _check_what_was_said(tiny_run, lines, exported, console.file.getvalue())
    model, info, _ = load_model(checkpoint_dir(tiny_run.config.run_dir, "tune", "tune"))
    assert info.sparse and not any("lora" in name for name in model.state_dict())

    # Ray Data itself says that it delivered exactly the planned micro-batches.
    source = prepare.source(tiny_run.config, "train")
    settings = tiny_run.config.stages.tune["tune"]
    order = Order(tuple(settings.tasks.items()), 8, sum(map(ord, "tune")), TUNE_STEPS)
    layout = Layout(0, 2, tiny_run.config.training.max_tokens_per_micro_batch)
    plan = planned_micro_batches(source, order, layout, range(TUNE_STEPS))
    stats = (tiny_run.config.run_dir / "data_stats" / "tune.txt").read_text()
    _, _, collated = stats.partition("MapBatches(collate_planned)")
    rows = re.search(r"Output num rows per block:.*?(\d+) total", collated)
    assert rows and int(rows.group(1)) == sum(len(micros) for micros in plan)
