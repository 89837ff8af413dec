"""Twenty faults at random in one run of stage 3 with the mini model."""

from __future__ import annotations

import math
import random

import pytest

from tests.chaos import faults, runs
from unimoe_ray import cluster, config
from unimoe_ray.report.write import write_report

FAULTS, STEPS, EVERY = 20, 220, 5
KINDS = (faults.kill_at, faults.fail_at, faults.terminate_at, faults.hang_at)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_random_faults_in_one_run(tmp_path):
    language = config.load("mini").model.language.model_dump(exclude_unset=True)
    run = runs.make_run(tmp_path, steps=STEPS, every=EVERY, model={"language": language})
    chance = random.Random(0)
    steps = sorted(chance.sample(range(2, STEPS), FAULTS))
    # Every fifth is a hang: each costs the timeout.
    what = [KINDS[3 if n % 5 == 4 else chance.randrange(3)](chance.randrange(2), step) for n, step in enumerate(steps)]
    run.config.training.elastic.hang_timeout = 30.0
    folder = tmp_path / "faults"
    with cluster.connect(run.config), faults.injected(folder, *what):
        runs.train(run)
    lines = runs.lines(run)
    assert len(faults.happened(folder)) == FAULTS
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(math.isfinite(line["loss"]) and line["samples"] == lines[0]["samples"] for line in lines)
    last = lines[-1]
    assert last["restarts"] == FAULTS and 0 < last["goodput"] < 1
    recoveries = [event for event in runs.lines(run, name="events.jsonl") if event["event"] == "resume"][1:]
    assert len(recoveries) == FAULTS and all(event["lost_steps"] <= 2 * EVERY for event in recoveries)
    assert last["lost_steps"] == sum(event["lost_steps"] for event in recoveries)
    page = write_report(run.config.run_dir).read_text(encoding="utf-8")
    assert page.count('class="time-stop"') == FAULTS and f"{100 * last['goodput']:.1f} %" in page
    seconds = sorted(event["seconds"] for event in runs.recoveries(run))
    print({"goodput": last["goodput"], "lost_steps": last["lost_steps"], "recovery_s": seconds})
