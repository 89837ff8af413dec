"""How runs share workers, and when a run that fails goes on."""

from __future__ import annotations

import socket

import pytest
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from unimoe_ray.errors import UsageError
from unimoe_ray.training.elastic import Perseverance
from unimoe_ray.training.interrupt import PlannedRestart
from unimoe_ray.training.pool import Pool, _answers, shares


@pytest.mark.parametrize(
    ("workers", "runs", "least", "expected"),
    [
        (4, "abc", 1, [2, 1, 1]),
        (8, "abc", 1, [3, 3, 2]),
        (2, "abc", 1, [1, 1, 0]),
        (5, "abc", 2, [3, 2, 0]),
        (1, "abc", 2, [0, 0, 0]),
        (4, "b", 1, [4]),
        (0, "ab", 1, [0, 0]),
    ],
)
def test_runs_share_workers_evenly_and_the_last_wait(workers, runs, least, expected):
    assert list(shares(workers, list(runs), least).values()) == expected


def test_workers_of_a_finished_run_go_to_the_others(tmp_path):
    pool = Pool(tmp_path / "pool.json", workers=4, least=1, need={"CPU": 1})
    nodes = {"a": {"CPU": 3.0}, "b": {"CPU": 1.0}}  # one CPU is Ray Data's
    pool.announce(["image", "speech", "audio"])
    assert [pool.share(run, nodes) for run in pool.runs()] == [1, 1, 1]
    assert [pool.wanted(run) for run in pool.runs()] == [2, 1, 1]
    pool.announce(["speech", "audio"])
    assert [pool.share(run, nodes) for run in ("image", "speech", "audio")] == [0, 2, 1]
    assert pool.share("audio", {"a": {"CPU": 2.0}}) == 0  # a node was lost, and there is one worker


def test_runs_share_cores_but_not_gpus(tmp_path):
    nodes = {"a": {"CPU": 5.0, "GPU": 2.0}}
    for need, expected in (({"CPU": 1}, [1, 1, 1]), ({"CPU": 1, "GPU": 1}, [1, 1, 0])):
        pool = Pool(tmp_path / "pool.json", 2, 1, need, side_by_side="GPU" not in need)
        pool.announce(["image", "speech", "audio"])
        assert [pool.share(run, nodes) for run in pool.runs()] == expected
        pool.announce(["audio"])
        assert pool.share("audio", nodes) == 2


def test_room_is_by_what_is_scarcest_on_each_node(tmp_path):
    pool = Pool(tmp_path / "pool.json", workers=9, least=1, need={"CPU": 1, "GPU": 1})
    assert pool.room({"a": {"CPU": 16.0, "GPU": 4.0}, "b": {"CPU": 16.0}, "c": {"CPU": 2.0, "GPU": 8.0}}) == 6
    assert Pool(tmp_path, 9, 1, {"CPU": 1}).room({"a": {"CPU": 1.0}}) == 1


def test_a_node_that_is_gone_does_not_answer():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))  # The port stays ours: nobody else may answer there.
        node = {"NodeManagerAddress": "127.0.0.1", "NodeManagerPort": server.getsockname()[1]}
        assert not _answers(node)
        server.listen()
        assert _answers(node)


def test_a_run_goes_on_as_long_as_it_comes_further():
    at = [0]
    policy = Perseverance(2, lambda: at[0])

    def decide(error: Exception, step: int = 0) -> FailureDecision:
        at[0] = step
        return policy.make_decision(WorkerGroupError("", {1: error}))

    assert [decide(RuntimeError(), step) for step in range(1, 20)] == [FailureDecision.RETRY] * 19
    assert [decide(RuntimeError(), 19) for _ in range(2)] == [FailureDecision.RETRY, FailureDecision.RAISE]
    policy = Perseverance(0, lambda: 0)
    assert decide(PlannedRestart("resize", "")) is FailureDecision.RETRY
    assert decide(RuntimeError(), 5) is FailureDecision.RAISE


def test_what_would_fail_again_is_not_tried_again():
    policy = Perseverance(5, lambda: 0)
    assert policy.make_decision(WorkerGroupError("", {0: UsageError("no")})) is FailureDecision.RAISE
    assert policy.make_decision(ControllerError(KeyError("x"))) is FailureDecision.RAISE
