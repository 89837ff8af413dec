"""Stage 2 on a real cluster: the experts' runs share its workers, and one that fails is no other's concern."""

from __future__ import annotations

import pytest

from tests.chaos import faults, runs
from tests.tiny import make_tiny_run
from unimoe_ray import cluster
from unimoe_ray.training.checkpoint import checkpoint_dir, is_complete


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_experts_share_workers_and_one_fails_alone(tmp_path):
    run = make_tiny_run(tmp_path, training={"elastic": runs.ELASTIC}, checkpoint={"every": 4})
    for name in ("image", "speech", "audio"):
        run.config.stages.experts[name].steps = 16 if name == "speech" else 6
    folder = tmp_path / "faults"
    with cluster.connect(run.config, local_cpus=5):
        what = (faults.fail_at(0, 3, run="experts/image"), faults.wait_at(10, run="experts/speech"))
        with faults.injected(folder, *what):
            runs.train(run, stage="experts", workers=3)
    assert all(is_complete(checkpoint_dir(run.config.run_dir, "experts", name)) for name in run.config.stages.experts)
    image, speech, audio = (runs.lines(run, f"experts/{name}") for name in ("image", "speech", "audio"))
    assert [[line["step"] for line in lines] for lines in (image, speech, audio)] == [
        list(range(1, 7)),
        list(range(1, 17)),
        list(range(1, 7)),
    ]
    # One failed, and began again alone.
    assert [stop["cause"] for stop in runs.stops(run, "experts/image")][0] == "error"
    for name in ("speech", "audio"):
        assert {stop["cause"] for stop in runs.stops(run, f"experts/{name}")} <= {"resize"}
    # Those that are finished left their workers to the last one, which lost no step.
    assert [line["world"] for line in speech[:10]] == [1] * 10
    assert speech[-1]["world"] > 1 and speech[-1]["lost_steps"] == 0
