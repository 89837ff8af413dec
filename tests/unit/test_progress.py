"""The display without a terminal and with one, and the reader of a growing file."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

from rich.console import Console

from unimoe_ray import progress as display
from unimoe_ray.progress import TrainProgress, follow_metrics


def _plain(width: int = 200) -> tuple[io.StringIO, Console]:
    out = io.StringIO()
    return out, Console(file=out, force_terminal=False, width=width)


def _step(step: int, loss: float = 1.0) -> dict:
    return {"step": step, "loss": loss, "tokens_per_s": 5300.0}


def test_without_a_terminal_only_first_and_last_steps_are_printed_within_the_interval() -> None:
    out, console = _plain()
    with TrainProgress(console, plain_interval_s=600.0) as progress:
        for step in range(1, 51):
            progress.update("experts/image", _step(step, 100.0 / step), 50)
        progress.done("experts/image")
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert "experts/image" in lines[0] and " 1/50" in lines[0] and "100.0" in lines[0]
    assert "50/50" in lines[1] and "loss  2.0000" in lines[1] and "5.3k tokens/s" in lines[1]


def test_the_interval_lets_steps_through_and_done_prints_an_unfinished_run() -> None:
    out, console = _plain()
    with TrainProgress(console, plain_interval_s=0.0) as progress:
        for step in (1, 2, 3):
            progress.update("a", _step(step), 10)
    assert len(out.getvalue().splitlines()) == 3

    out, console = _plain()
    with TrainProgress(console, plain_interval_s=600.0) as progress:
        for step in (1, 2, 3):
            progress.update("a", _step(step), 10)
        progress.done("a")
        progress.done("a")
    assert [line.split()[3] for line in out.getvalue().splitlines()] == ["1/10", "3/10"]


def test_messages_are_not_read_as_markup() -> None:
    out, console = _plain()
    with TrainProgress(console) as progress:
        progress.message("runs/[bold]x[/bold]")
        progress.count("encoding [image]", 3, 3)
    assert "runs/[bold]x[/bold]" in out.getvalue()
    assert "encoding [image]" in out.getvalue()


def test_on_a_terminal_prints_pass_and_the_finished_line_stays() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, color_system=None, legacy_windows=False)
    with TrainProgress(console) as progress:
        progress.update("base", _step(1), 2)
        print("an ordinary print")
        progress.update("base", _step(2), 2)
        progress.done("base")
    text = out.getvalue()
    assert "an ordinary print" in text
    assert any("100 %  2/2" in line for line in text.splitlines())


def test_follow_metrics_waits_for_half_written_lines(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    read = follow_metrics(path)
    assert read() == []
    with open(path, "w") as file:
        file.write(json.dumps({"step": 1}) + "\n" + '{"st')
        file.flush()
        assert read() == [{"step": 1}]
        assert read() == []
        file.write('ep": 2}\nnot json\n[1]\n{"step": 3}\n')
        file.flush()
        assert read() == [{"step": 2}, {"step": 3}]
    path.write_text('{"step": 9}\n')
    assert read() == [{"step": 9}]


def test_what_is_counted_without_knowing_of_how_much() -> None:
    out, console = _plain()
    with TrainProgress(console, plain_interval_s=600.0) as progress:
        progress.count("reading", 10, None)
        progress.count("reading", 20, None)
        progress.count("reading", 25, 25)
    first, last = out.getvalue().splitlines()
    assert first.split() == ["reading", "10"] and last.split()[:4] == ["reading", "100", "%", "25/25"]


def test_what_is_counted_has_a_rate_and_the_time_that_is_left(monkeypatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(display, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    out, console = _plain()
    with TrainProgress(console, plain_interval_s=0.0) as progress:
        for done in (0, 30, 60, 90):
            progress.count("encoding media", done, 150)
            clock[0] += 4.0
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert lines[0] == ["encoding", "media", "0", "%", "0/150"]
    assert lines[-1] == ["encoding", "media", "60", "%", "90/150", "7.5/s", "0:08", "left"]
