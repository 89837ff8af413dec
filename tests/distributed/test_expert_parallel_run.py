"""Real Ray Train runs whose experts are spread over the workers."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tests.tiny import TinyRun, make_tiny_run
from unimoe_ray import cluster
from unimoe_ray.data import prepare
from unimoe_ray.errors import UsageError
from unimoe_ray.training.checkpoint import checkpoint_dir, read_weights, recipe
from unimoe_ray.training.trainer import recipe as wanted_recipe
from unimoe_ray.training.trainer import run_stage


@pytest.fixture
def run(tmp_path) -> TinyRun:
    """Ready for stage 3. Adam's eps is above rounding noise, of which it would make steps of full size."""
    run = make_tiny_run(tmp_path, training={"optimizer": {"eps": 1e-6}})
    for name in run.config.stages.experts:
        manifest = checkpoint_dir(run.config.run_dir, "experts", name) / "manifest.json"
        made_by = wanted_recipe(run.config, "experts", name, run.info, prepare.source(run.config, "train"))
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"recipe": made_by}))
    return run


def _tune(run: TinyRun, workers: int = 2) -> tuple[dict[str, torch.Tensor], str, list[dict]]:
    """Weights, recipe and metrics of stage 3, trained anew."""
    folder = checkpoint_dir(run.config.run_dir, "tune", "tune")
    shutil.rmtree(folder, ignore_errors=True)
    source = prepare.source(run.config, "train")
    follow = lambda *_: None  # noqa: E731
    run_stage(run.config, "tune", run.info, source, run.tokenizer, workers=workers, use_gpu=False, follow=follow)
    lines = [json.loads(line) for line in (run.config.run_dir / "metrics.jsonl").read_text().splitlines()]
    return read_weights(folder), recipe(folder), [line for line in lines if line["run"] == "tune"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_experts_on_two_workers_that_move_end_with_the_same_model(run):
    settings = run.config.training
    with cluster.connect(run.config):
        weights, made_by, lines = _tune(run)
        # Experts spread, and moved whenever that looks the least better: slow ranks and quick links make it so.
        settings.expert_parallel.ep_size = 2
        placement = run.config.placement
        placement.interval, placement.min_gain, placement.tflops = 1, 0.0, 1e-6
        spread, made_by_spread, lines_spread = _tune(run)
    assert made_by_spread == made_by
    for line, other in zip(lines, lines_spread, strict=True):
        assert other["loss"] == pytest.approx(line["loss"], abs=2e-6)
        assert other["expert_tokens"] == line["expert_tokens"]
    moved = [line["moved_experts"] for line in lines_spread if "moved_experts" in line]
    assert moved and all(m["predicted_gain"] > 0 and m["seconds"] > 0 for m in moved)
    assert all(source != target for m in moved for _, _, source, target in m["moves"])
    assert "moved_experts" not in lines_spread[-1]
    assert spread.keys() == weights.keys()
    for name, tensor in weights.items():
        assert (spread[name] - tensor).abs().max() <= 1e-5, name


def test_experts_that_do_not_fit_the_workers_are_refused_before_anything_starts(run):
    run.config.training.expert_parallel.ep_size = 2
    with pytest.raises(UsageError, match=r"parallel.ep_size is 2; with 3 workers and 4 experts allowed: auto, 1, 3"):
        _tune(run, workers=3)
