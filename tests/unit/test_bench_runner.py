"""The benchmarks' runner: ratios out of records, their comparison, the table."""

from __future__ import annotations

import copy
import json

import pytest

from benchmarks import run as runner
from benchmarks.figures import FIGURES, compare, ratios, table


def ratio(name="tokens/s", value=1.0, against="peer", better="higher", tolerance=0.25, target=None) -> dict:
    return {
        "name": name,
        "value": value,
        "against": against,
        "better": better,
        "tolerance": tolerance,
        "target": target,
    }


def result(*found: dict, state="done", reason="") -> dict:
    run = {"state": state, "reason": reason, "ratios": list(found), "command": "python x.py", "notes": ["vLLM is out"]}
    machine = {"cpu": "a CPU", "cores": 2, "load": 0.5}
    return {"commit": "abc", "date": "2026-01-02", "machine": machine, "benchmarks": {"one": run}}


@pytest.mark.parametrize(
    ("better", "now", "regression"),
    [("higher", 0.76, False), ("higher", 0.74, True), ("higher", 9.0, False)]
    + [("lower", 1.24, False), ("lower", 1.26, True), ("lower", 0.1, False)],
)
def test_a_change_for_the_worse_past_the_tolerance_is_a_regression(better, now, regression):
    before = result(ratio(better=better))
    worse, skipped = compare(before, result(ratio(value=now, better=better)))
    assert (len(worse), skipped) == (int(regression), [])
    if regression:
        word, bound = ("at least", 0.75) if better == "higher" else ("at most", 1.25)
        assert worse == [f"one: tokens/s over peer: {now}, was 1; allowed: {word} {bound}"]


def test_the_tolerance_and_the_direction_are_those_of_the_baseline():
    before = result(ratio(tolerance=0.01))
    assert compare(before, result(ratio(value=0.98, tolerance=0.9)))[0]
    assert compare(before, result(ratio(value=0.98, better="lower")))[0]


def test_what_fails_now_is_a_regression_and_what_is_left_out_is_not():
    before = result(ratio(), ratio(against="vLLM"))
    worse, _ = compare(before, result(state="failed", reason="ValueError: no"))
    assert worse == ["one: fails now: ValueError: no"]
    assert compare(before, result(state="left out", reason="vllm is not installed")) == (
        [],
        ["one: vllm is not installed"],
    )
    assert compare(before, result(ratio())) == ([], ["one: tokens/s over vLLM: not measured now"])
    gone = copy.deepcopy(before)
    gone["benchmarks"] = {}
    assert compare(before, gone) == ([], ["one: not run"])
    assert compare(result(state="failed", reason="x"), before) == ([], [])


def test_the_table_tells_machine_ratios_and_reasons():
    found = result(ratio(value=0.5), ratio("TTFT", 1.5, "bare app", "lower", target=2.0))
    found["benchmarks"]["two"] = {"state": "left out", "reason": "vllm is not installed", "command": "python y.py"}
    text = table(found)
    assert "| tokens/s | 0.5 | peer | higher |  |" in text and "| TTFT | 1.5 | bare app | lower | 2 |" in text
    assert "left out: vllm is not installed" in text and "2026-01-02, commit abc, a CPU, 2 cores" in text


def test_ratios_of_serving():
    def row(speed: float, over: float) -> dict:
        return {"tokens_per_s": speed, "ours_over_it": over}

    size = {
        "ours": {"1": row(50, 1.0)},
        "vLLM": {"1": row(25, 2.0)},
        "limit": {"1": 200.0},
        "equal": {"ours": "1 of 1"},
    }
    found = ratios("serving", {"benchmark": "serving", "threads": 1, "load": 0.1, "h256": size})
    assert [(r["name"], r["against"], r["value"]) for r in found] == [
        ("1 requests, tokens/s", "vLLM", 2.0),
        ("1 requests, tokens/s", "memory-bandwidth limit", 0.25),
    ]


def test_ratios_of_the_mixture_layer():
    lines = [
        {"case": "train:4:64", "name": name, "ms": 1.0, "of_dense": dense, "of_ceiling": ceiling}
        for name, dense, ceiling in [
            ("ours", 0.9, 0.95),
            ("dense, same active FLOPs", 1.0, 1.1),
            ("ceiling", 0.95, 1.0),
            ("original loop", 0.6, 0.5),
        ]
    ]
    found = ratios("moe_block", {"results": lines})
    assert [(r["against"], r["value"]) for r in found] == [
        ("dense of the same active FLOPs", 0.9),
        ("ceiling", 0.95),
        ("original loop", 1.5),
    ]


def test_ratios_of_the_endpoint_have_their_targets():
    over = {"tokens_per_s": 0.9, "ttft": 1.5}
    found = ratios(
        "endpoint", {"sizes": {"h256": {"endpoint_over_bare": over, "cached_over_new_ttft": {"picture": 0.3}}}}
    )
    assert [(r["name"], r["value"], r["better"], r["target"]) for r in found] == [
        ("h256, tokens/s", 0.9, "higher", 0.85),
        ("h256, TTFT", 1.5, "lower", 2.0),
        ("h256, TTFT of a cached picture", 0.3, "lower", 0.4),
    ]


def test_a_benchmark_that_is_not_known_has_no_ratios():
    assert ratios("new", {"anything": 1}) == []


def test_every_benchmark_with_ratios_is_there():
    assert set(FIGURES) <= set(runner.find())


@pytest.mark.parametrize(
    ("script", "state", "reason"),
    [
        ("print('peer is left out: absent')\nprint('{\"benchmark\": \"x\"}')", "done", ""),
        ("raise ValueError('broken')", "failed", "ValueError: broken"),
        ("import vllm_that_nobody_has", "left out", "vllm_that_nobody_has is not installed"),
        ("print('words')", "failed", "no line of JSON at its end"),
        ("import time\ntime.sleep(60)", "failed", "not done within 1 s"),
    ],
)
def test_how_a_benchmark_ends_is_told(script, state, reason, tmp_path, monkeypatch):
    (tmp_path / "x.py").write_text(script)
    monkeypatch.setattr(runner, "FOLDER", tmp_path)
    done = runner.run("x", [], 1.0 if "sleep" in script else 30.0)
    assert (done["state"], done["reason"]) == (state, reason)
    assert done["notes"] == (["peer is left out: absent"] if state == "done" else [])


def test_a_check_ends_with_1_for_a_regression(tmp_path, monkeypatch, capsys):
    over = {"dense": {"training tokens/s": 1.0, "FLOPs": 1.0, "parameters": 2.0}}
    script = tmp_path / "sparse.py"

    def bench(speed: float, *arguments: str) -> int:
        over["dense"]["training tokens/s"] = speed
        script.write_text(f"import json  # __main__\nprint(json.dumps({{'mixture_over': {json.dumps(over)}}}))")
        monkeypatch.setattr("sys.argv", ["run.py", *arguments])
        return runner.main()

    (tmp_path / "results").mkdir()
    for name, path in (("ROOT", tmp_path), ("FOLDER", tmp_path), ("RESULTS", tmp_path / "results/bench.json")):
        monkeypatch.setattr(runner, name, path)
    assert bench(1.0, "--check") == 2
    assert bench(1.0) == 0
    assert "| training tokens/s | 1 | dense | higher |" in (tmp_path / "RESULTS.md").read_text()
    assert (tmp_path / "results/bench.svg").read_text().startswith("<?xml")
    assert bench(0.9, "--check") == 0
    assert bench(0.5, "--check") == 1
    assert "regression: sparse: training tokens/s over dense: 0.5, was 1" in capsys.readouterr().out
