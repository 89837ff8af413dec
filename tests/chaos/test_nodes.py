"""Nodes that are lost and join in a real run of stage 3 on several nodes: it goes on with the workers there are."""

from __future__ import annotations

import pytest

from tests.chaos import faults, runs
from tests.chaos.nodes import cluster_of
from tests.chaos.runs import Undisturbed


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("ep_size", [1, 2])
def test_two_workers_one_and_two_again(tmp_path, ep_size):
    """With ep_size 2, the node that is lost takes half of the experts with it."""
    run = runs.make_run(tmp_path, steps=16)
    folder = tmp_path / "faults"
    with cluster_of(2) as nodes:
        undisturbed = Undisturbed.of(run)
        runs.again(run)
        run.config.training.expert_parallel.ep_size = ep_size
        follow = runs.at(run, folder, {7: nodes.kill, 10: nodes.add})
        with faults.injected(folder, faults.hold_at(7), faults.wait_at(10)):
            runs.train(run, workers=2, follow=follow)
    lines = runs.same(run, undisturbed)
    lost, grown = runs.recoveries(run)
    assert [line["world"] for line in lines] == [2] * 4 + [1] * 6 + [2] * 6
    assert (lost["cause"], lost["lost_steps"]) == ("lost", 2)
    assert (grown["cause"], grown["lost_steps"]) == ("resize", 0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_four_workers_two_and_three(tmp_path):
    run = runs.make_run(tmp_path, steps=16)
    run.config.training.expert_parallel.ep_size = "auto"
    folder = tmp_path / "faults"

    with cluster_of(4) as nodes:
        undisturbed = Undisturbed.of(run, workers=4)
        runs.again(run)

        def kill_two() -> None:
            nodes.kill()
            nodes.kill()

        follow = runs.at(run, folder, {7: kill_two, 10: nodes.add})
        with faults.injected(folder, faults.hold_at(7), faults.wait_at(10)):
            runs.train(run, workers=4, follow=follow)
    lines = runs.same(run, undisturbed)
    assert [line["world"] for line in lines] == [4] * 4 + [2] * 6 + [3] * 6
    assert [r["cause"] for r in runs.recoveries(run)] == ["lost", "resize"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_node_that_is_about_to_be_taken_away(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")  # off in clusters made for a command
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    run = runs.make_run(tmp_path)
    folder = tmp_path / "faults"
    with cluster_of(2) as nodes:
        undisturbed = Undisturbed.of(run)
        runs.again(run)
        follow = runs.at(run, folder, {6: nodes.drain})
        with faults.injected(folder, faults.wait_at(6)):
            runs.train(run, workers=2, follow=follow)
    lines = runs.same(run, undisturbed)
    (recovery,) = runs.recoveries(run)
    assert (recovery["cause"], recovery["lost_steps"]) == ("preemption", 0)
    assert [line["world"] for line in lines] == [2] * 6 + [1] * 6
