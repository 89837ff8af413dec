"""The timeline of a run that was stopped, and the account that its lines have of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from unimoe_ray.report.write import write_report
from unimoe_ray.training import recovery
from unimoe_ray.training.recovery import (
    DRIVER,
    EVENTS,
    METRICS,
    RECOVERED,
    START,
    STOP,
    Account,
    append,
    forget_events,
    last_step,
    read_lines,
    write_event,
)


def lines_of(folder: Path, steps: range, begin: float, run: str = "tune", **more) -> None:
    for number, step in enumerate(steps):
        line = {"step": step, "steps": 9, "stage": run, "run": run, "loss": 1.0, "seconds": 1.0, "expert_load": None}
        append(folder / METRICS, line | {"time": begin + number} | more)


def events_of(folder: Path, *events: tuple[float, str], **more) -> None:
    for time, event in events:
        append(folder / EVENTS, {"event": event, "run": "tune", "time": time} | more)


@pytest.fixture
def stopped(tmp_path) -> Path:
    """Workers that began at 100 and stopped at 121 after step 6, the last state being that of step 4; others, that
    began at 122 and had that state at 130."""
    events_of(tmp_path, (99.0, DRIVER), reached=0)
    events_of(tmp_path, (100.0, START), workers=2)
    append(tmp_path / EVENTS, {"event": "resume", "run": "tune", "time": 112.0, "step": 0, "lost_steps": 0})
    lines_of(tmp_path, range(1, 7), 115.0)
    events_of(tmp_path, (121.0, STOP), cause="lost", text="rank 1 on node n is gone; after step 6")
    events_of(tmp_path, (122.0, START), workers=1)
    return tmp_path


def test_the_account_of_a_stop(stopped, monkeypatch):
    now = iter((130.0, 140.0, 140.0, 141.0))
    monkeypatch.setattr(recovery, "time", SimpleNamespace(time=lambda: next(now)))
    monkeypatch.setattr("unimoe_ray.training.recovery._marks", {"entered": 126.0, "imported": 128.0, "restored": 133.0})
    account = Account(stopped, "tune", done=4)
    first, second = account.line(3.0), account.line(1.0)
    assert first == {
        "goodput": round((4 + 3) / 40, 4),
        "restarts": 1,
        "lost_steps": 2,
        "recovery": {
            "cause": "lost",
            "lost_steps": 2,
            "seconds": 19.0,
            "scheduling_s": 1.0,
            "process_s": 4.0,
            "import_s": 2.0,
            "restore_s": 5.0,
            "first_step_s": 7.0,
            "standby": False,
        },
    }
    assert [event["event"] for event in read_lines(stopped / EVENTS, "tune")][-2:] == ["resume", RECOVERED]
    assert second == {"goodput": round(8 / 41, 4), "restarts": 1, "lost_steps": 2}


def test_a_start_that_is_tried_again_is_no_recovery(tmp_path):
    events_of(tmp_path, (99.0, DRIVER), reached=0)
    events_of(tmp_path, (100.0, START), (160.0, START), workers=2)
    line = Account(tmp_path, "tune", done=0).line(1.0)
    assert line["restarts"] == 0 and "recovery" not in line


def test_the_time_without_a_driver_is_not_lost(stopped, monkeypatch):
    """The driver was killed at 122 too, and began again at 1000; it dropped the lines of the steps that come again."""
    lines = [line for line in read_lines(stopped / METRICS, "tune") if line["step"] <= 4]
    (stopped / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    events_of(stopped, (1000.0, DRIVER), reached=6)
    events_of(stopped, (1001.0, START), workers=1)
    now = iter((1009.0, 1010.0, 1010.0))
    monkeypatch.setattr(recovery, "time", SimpleNamespace(time=lambda: next(now)))
    line = Account(stopped, "tune", done=4).line(1.0)
    assert (line["recovery"]["cause"], line["recovery"]["seconds"], line["lost_steps"]) == ("driver", 10.0, 2)
    assert line["goodput"] == round(5 / (1010 - 100 - (1000 - 122)), 4)


def test_events_of_a_run_that_begins_anew_go(stopped):
    write_event(stopped, "experts/image", START)
    forget_events(stopped, "tune")
    assert [event["run"] for event in map(json.loads, (stopped / EVENTS).read_text().splitlines())] == ["experts/image"]


def test_the_last_step_of_a_run(tmp_path):
    assert last_step(tmp_path, "tune") == 0
    lines_of(tmp_path, range(1, 4), 0.0)
    lines_of(tmp_path, range(1, 900), 0.0, run="align")
    assert last_step(tmp_path, "align") == 899
    (tmp_path / METRICS).open("a").write('{"step": 9, "run": "ali')  # killed while it wrote
    assert last_step(tmp_path, "align") == 899


def test_the_report_draws_starts_steps_losses_and_stops(stopped):
    lines = [line for line in read_lines(stopped / METRICS, "tune") if line["step"] <= 4]
    (stopped / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    append(stopped / EVENTS, {"event": "resume", "run": "tune", "time": 130.0, "step": 4, "lost_steps": 2})
    events_of(stopped, (140.0, RECOVERED), cause="lost", lost_steps=2, seconds=19.0)
    lines_of(stopped, range(5, 10), 140.0, goodput=0.25, restarts=1, lost_steps=2)
    (stopped / "config.yaml").write_text("name: x\n")
    page = write_report(stopped).read_text()
    drawn = page[page.index('class="timeline"') :]
    titles = re.findall(r"<title>(.*?)</title>", drawn)
    assert titles == [
        "Timeline of 1 run over 45 s",
        "2 workers: starting, 12 s",
        "2 workers: steps 1 to 4",
        "lost, 3.0 s",
        "1 worker: starting, 8.0 s",
        "1 worker: steps 5 to 9",
        "rank 1 on node n is gone; after step 6",
    ]
    cells = re.findall(r'<td class="num">(.*?)</td>', drawn[drawn.index("<table") :])
    assert cells[:4] == ["25.0 %", "1", "2", "19 s"]
    assert "worker lost</strong> tune: rank 1 on node n is gone" in page


def test_a_run_of_another_version_has_no_timeline(tmp_path):
    lines_of(tmp_path, range(1, 3), 10.0)
    assert "Nothing is written down of when workers started" in write_report(tmp_path).read_text()
