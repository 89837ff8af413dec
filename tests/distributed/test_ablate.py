"""The ablation job on the tiny suite: two arms of one seed, one after the other, nothing left to do, an analysis."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unimoe_ray.errors import UnimoeError
from unimoe_ray.mini.assets import fetch

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(2700)
def test_an_experiment_goes_on_where_it_was(tmp_path):
    try:
        fetch(debian_packages=False)
    except UnimoeError as error:
        pytest.skip(f"mini assets can't be had: {error}")
    steps = ["base.base", "align.align", "tune.tune", "experts.image", "experts.speech", "experts.audio"]
    overrides = [f"stages.{name}.steps=2" for name in steps]
    overrides += ["mini.scale=tiny", f"data.dir={tmp_path}/data", "evaluation.limit=6", "training.workers=1", "seed=3"]

    def ablate(*arms: str, out: str = "out") -> str:
        words = ["--seeds", "1", "--out", str(tmp_path / out), *overrides, "--results", str(tmp_path / "results")]
        return run("jobs.ablate", *words, *(word for arm in arms for word in ("--arm", arm)))

    def run(module: str, *words: str) -> str:
        command = [sys.executable, "-m", module, *words]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    ablate("dense")
    dense = tmp_path / "out" / "dense-s3" / "evaluations" / "dev" / "eval.json"
    before = dense.read_text(), dense.stat().st_mtime_ns
    (tmp_path / "results" / "ablate-runs.jsonl").unlink()
    shown = ablate("dense", "experts-8")
    assert "dense-s3: finished already" in shown and "trunk-s3: stage base: finished already" in shown
    assert (dense.read_text(), dense.stat().st_mtime_ns) == before
    results = json.loads((tmp_path / "out" / "results-dev.json").read_text())
    assert (results["finished"], results["planned"]) == (2, 2)
    mixture = results["arms"]["experts-8"]
    assert mixture["figures"]["accuracy"]["seeds"] == 1
    assert mixture["cost"]["seconds"] > 0 and mixture["cost"]["active"] < mixture["cost"]["parameters"]
    answered = (tmp_path / "out" / "experts-8-s3" / "evaluations" / "dev" / "eval_samples.jsonl").read_text()
    assert len(answered.splitlines()) == 6 * len(json.loads(before[0])["tasks"])
    # Elsewhere, the outcomes that were kept do: no data, no training, the same figures.
    ablate("dense", "experts-8", out="elsewhere")
    assert not (tmp_path / "elsewhere" / "dense-s3").exists()
    assert json.loads((tmp_path / "elsewhere" / "results-dev.json").read_text()) == results

    # The analysis of one of its runs: eight experts, and combinations of real files that training did not have.
    run("unimoe_ray.cli", "analyse", str(tmp_path / "out" / "experts-8-s3"), "--samples", "2")
    analysis = json.loads((tmp_path / "out" / "experts-8-s3" / "analysis.json").read_text())
    assert len(analysis["off"]["without"]) == 8 and len(analysis["routing"]["before"]["score"]) == 4
    assert {about["media"] for about in analysis["unseen"].values()} == {
        "image + audio",
        "speech + audio",
        "video + speech",
    }
    assert all(about["n"] == 100 for about in analysis["unseen"].values()) and len(analysis["unseen"]) == 5
