"""Real Ray Train runs on a tiny model: side by side, delivered by Ray Data, resumed by stage."""

from __future__ import annotations

import json
import re

import pytest

from tests.tiny import TinyRun
from unimoe_ray import cluster
from unimoe_ray.data import prepare
from unimoe_ray.data.loader import planned_micro_batches
from unimoe_ray.data.plan import Mixture
from unimoe_ray.data.samples import SampleTable
from unimoe_ray.training.checkpoint import checkpoint_dir, is_complete, load_model
from unimoe_ray.training.trainer import run_stage


def _run(run: TinyRun, stage: str, workers: int) -> list[str]:
    source = prepare.source(run.config, "train")
    return run_stage(
        run.config, stage, run.info, source, run.tokenizer, workers=workers, use_gpu=False, follow=lambda *_: None
    )


def _metrics(run: TinyRun) -> list[dict]:
    return [json.loads(line) for line in (run.config.run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(600)
def test_stages_on_a_real_cluster(tiny_run):
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
        assert _run(tiny_run, "tune", workers=2) == ["tune"]
    lines = [x for x in _metrics(tiny_run) if x["run"] == "tune"]
    assert [x["step"] for x in lines] == [1, 2, 3]
    assert all(x["world"] == 2 and x["samples"] == 8 for x in lines)
    assert all(sum(layer) == pytest.approx(1, abs=1e-3) for x in lines for layer in x["expert_load"])
    model, info, _ = load_model(checkpoint_dir(tiny_run.config.run_dir, "tune", "tune"))
    assert info.sparse and not any("lora" in name for name in model.state_dict())

    # Ray Data itself says that it delivered exactly the planned micro-batches.
    source = prepare.source(tiny_run.config, "train")
    settings = tiny_run.config.stages.tune["tune"]
    mixture = Mixture.build(settings.tasks, SampleTable(source.samples).by_task())
    plan = planned_micro_batches(
        source,
        mixture,
        steps=3,
        batch_size=8,
        seed=sum(map(ord, "tune")),
        rank=0,
        world=2,
        max_tokens=tiny_run.config.training.max_tokens_per_micro_batch,
    )
    stats = (tiny_run.config.run_dir / "data_stats" / "tune.txt").read_text()
    assert "MapBatches(collate_planned)" in stats
    rows = re.search(r"Output num rows per block:.*?(\d+) total", stats)
    assert rows and int(rows.group(1)) == sum(len(micros) for micros in plan)
