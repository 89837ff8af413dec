"""Workers that fail, die, hang or are taken away in a real run of stage 3: it ends as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import faults, runs
from tests.chaos.runs import Undisturbed
from tests.tiny import TinyRun
from unimoe_ray import cluster
from unimoe_ray.errors import UnimoeError
from unimoe_ray.training.pool import DATA_CPUS


def disturbed(run: TinyRun, folder: Path, *what: faults.Fault, **given) -> list[dict]:
    runs.again(run)
    with faults.injected(folder, *what):
        runs.train(run, **given)
    return runs.lines(run)


def checked(run: TinyRun, undisturbed: Undisturbed) -> list[dict]:
    runs.same(run, undisturbed)
    return runs.recoveries(run)


@pytest.mark.timeout(600)
def test_a_killed_worker_and_one_that_is_taken_away(tmp_path):
    run = runs.make_run(tmp_path)
    with cluster.connect(run.config, 2 + DATA_CPUS):  # no room but what the failed workers give back
        undisturbed = Undisturbed.of(run)
        disturbed(run, tmp_path / "faults", faults.kill_at(1, 7), faults.terminate_at(0, 10))
    lines = runs.same(run, undisturbed)
    assert {line["world"] for line in lines} == {2}
    found = runs.recoveries(run)
    assert [recovery["cause"] for recovery in found] == ["lost", "preemption"], runs.lines(run, name="events.jsonl")
    lost, taken = found
    assert (lost["lost_steps"], taken["lost_steps"]) == (2, 0)  # step 4 had the last state
    assert lines[-1]["restarts"] == 2 and lines[-1]["lost_steps"] == 2
    (began, *_) = [event["time"] for event in runs.lines(run, name="events.jsonl") if event["event"] == "start"]
    away = sum(recovery["seconds"] - recovery["first_step_s"] for recovery in found)
    assert 0 < lines[-1]["goodput"] < 1 - away / (lines[-1]["time"] - began)
    assert 0 < undisturbed.lines[-1]["goodput"] <= 1
    parts = ("scheduling_s", "process_s", "import_s", "restore_s", "first_step_s")
    assert lost["seconds"] == pytest.approx(sum(lost[part] for part in parts), abs=0.01)
    assert "rank 1 on node" in runs.stops(run)[0]["text"] and runs.stops(run)[0]["text"].endswith("after step 6")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_fault_of_a_worker(tmp_path):
    run = runs.make_run(tmp_path)
    with cluster.connect(run.config):
        undisturbed = Undisturbed.of(run)

        run.config.training.elastic.hang_timeout = 30.0
        disturbed(run, tmp_path / "hang", faults.hang_at(1, 6))
        run.config.training.elastic.hang_timeout = 90.0
        (hang,) = checked(run, undisturbed)
        assert (hang["cause"], hang["lost_steps"]) == ("hang", 1)
        (stop,) = runs.stops(run)
        assert stop["rank"] == 1 and "time.sleep(1)" in stop["traceback"]

        disturbed(run, tmp_path / "raise", faults.fail_at(0, 6), faults.kill_at(0, 9))
        failed, killed = checked(run, undisturbed)
        assert (failed["cause"], failed["lost_steps"]) == ("error", 1)
        assert killed["cause"] == "lost" and killed["lost_steps"] in (0, 4)  # the state of step 8 may be on its way
        stop = runs.stops(run)[0]
        assert stop["rank"] == 0 and "ValueError: injected into step 6" in stop["text"]
        assert stop["traceback"].splitlines()[-1] == "ValueError: injected into step 6"

        # What fails again and again is given up, with its reason.
        run.config.training.elastic.max_failures = 0
        with pytest.raises(
            UnimoeError, match=r"^stage tune failed: rank 1 on node .* ValueError: injected into step 3"
        ):
            disturbed(run, tmp_path / "give up", faults.fail_at(1, 3))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_bad_losses_are_skipped_or_gone_back_from(tmp_path):
    run = runs.make_run(tmp_path)
    with cluster.connect(run.config):
        skipped = disturbed(run, tmp_path / "skip", faults.nan_at(6), faults.explode_at(9))
        assert [line["step"] for line in skipped if "skipped" in line] == [6, 9]
        weights = runs.weights(run)
        findings = runs.lines(run, name="findings.jsonl")
        assert [f["step"] for f in findings if f["signature"] == "skipped"] == [6, 9]

        run.config.training.elastic.bad_loss = "rewind"
        rewound = disturbed(run, tmp_path / "rewind", faults.nan_at(6), faults.explode_at(9))
        assert [line["step"] for line in rewound if "skipped" in line] == [6, 9]
        assert [r["cause"] for r in runs.recoveries(run)] == ["rewind", "rewind"]
        # Both left the same two steps out.
        for line, other in zip(skipped, rewound, strict=True):
            assert line["step"] in (6, 9) or line["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert all((tensor - weights[name]).abs().max() <= 1e-4 for name, tensor in runs.weights(run).items())

        run.config.training.elastic.bad_loss = "stop"
        with pytest.raises(
            UnimoeError, match=r"^stage tune failed: step 6: the loss is nan \(training.elastic.bad_loss"
        ):
            disturbed(run, tmp_path / "stop", faults.nan_at(6))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_storage_that_is_damaged_full_read_only_or_slow(tmp_path):
    run = runs.make_run(tmp_path, steps=16)
    states = Path(run.config.run_dir) / "states" / "tune"
    with cluster.connect(run.config):
        undisturbed = Undisturbed.of(run)

        folder = tmp_path / "corrupt"
        follow = runs.at(run, folder, {10: lambda: faults.corrupt_shard(states)})
        disturbed(run, folder, faults.hold_at(10), faults.kill_at(1, 11), follow=follow)
        (recovery,) = checked(run, undisturbed)
        assert recovery["lost_steps"] == 6  # back to step 4
        assert any("passed over" in f["text"] for f in runs.lines(run, name="findings.jsonl"))

        with faults.small_disk(tmp_path / "disk", 2**20) as disk:
            run.config.checkpoint.location = str(disk)
            for number, spoil in enumerate((faults.fill_disk, faults.make_read_only)):
                folder = tmp_path / f"disk-{number}"
                follow = runs.at(run, folder, {6: lambda spoil=spoil: spoil(disk)})
                disturbed(run, folder, faults.hold_at(6), faults.kill_at(0, 11), follow=follow)
                (recovery,) = checked(run, undisturbed)
                assert recovery["lost_steps"] == 6
                told = [f["text"] for f in runs.lines(run, name="findings.jsonl") if f["signature"] == "checkpoint"]
                why = ("No space left on device", "Read-only file system")[number]
                assert told and all("was not written" in text and why in text for text in told), told
                if number == 0:
                    (disk / "filler").unlink()
            run.config.checkpoint.location = None

        lines = disturbed(run, tmp_path / "slow", faults.slow_storage(3.0))
        runs.same(run, undisturbed)
        written = [line["checkpoint"] for line in lines if "checkpoint" in line]
        assert written and all(state["write_s"] >= 3 and state["copy_s"] < 1 for state in written)
