"""``unimoe plan-experts``: on recorded runs, given loads and presets; one line for every mistake."""

import json

import numpy as np
import pytest

from tests.unit.test_cli import fails, prints
from unimoe_ray import config as configuration
from unimoe_ray.plan_experts import plan_experts, recorded


def write_metrics(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "ru')
    return path


def step(number, run="tune", **more):
    return {"step": number, "run": run, "tokens": 100} | more


@pytest.fixture
def metrics(tmp_path):
    """An older run, a dense stage, and three steps of the run that counts, by kind of token."""
    kinds = {"text": [[30, 10, 10, 10]], "image": [[0, 200, 0, 0]], "speech": [[0, 0, 90, 0]]}
    lines = [step(9, "other", expert_load=[[1, 0]]), step(1, "base", expert_load=None)]
    lines += [step(number, expert_load=[[0.25] * 4], expert_tokens=kinds) for number in (1, 2, 3)]
    return write_metrics(tmp_path / "metrics.jsonl", lines)


def test_a_recorded_run_by_kind_of_token(metrics, capsys):
    tokens, origin = recorded(metrics)
    np.testing.assert_array_equal(tokens["image"], [[0, 200, 0, 0]])
    assert list(tokens) == ["text", "image", "speech"] and origin.endswith("run tune, steps 1 to 3")
    text = prints(
        capsys, "plan-experts", metrics, "--ranks", 2, "--nodes", 2, "--reads", "0=speech", "--reads", "1=image"
    )
    # The image expert alone is more than an even part: all else goes to the other rank, two slots and one to spare.
    assert "layer 0: slowest/mean 1.200: 0 2 3 | 1" in text
    assert (
        "experts 1: mostly image, which node 1 reads" in text and "experts 2: mostly speech, which node 0 reads" in text
    )


def test_json_and_replicas(metrics, capsys):
    found = json.loads(prints(capsys, "plan-experts", metrics, "--ranks", "2", "--replicas", "--json"))
    assert found["layers"] == [[[0, 1, 2], [1, 2, 3]]] or found["imbalance"] < 1.01
    assert found["slots"] == [3, 3] and found["nodes"] == [0, 0] and found["crossing"] == 0


def test_shares_of_the_load_where_kinds_were_not_recorded(tmp_path):
    lines = [step(1, expert_load=[[0.5, 0.5]], tokens=100), step(2, expert_load=[[1.0, 0.0]], tokens=300)]
    tokens, _ = recorded(write_metrics(tmp_path / "metrics.jsonl", lines))
    np.testing.assert_allclose(tokens["all"], [[175, 25]])


def test_a_run_folder_brings_its_sizes_and_settings(tmp_path, metrics):
    settings = configuration.load("mini", ["placement.slots=4", "model.language.hidden_size=512"])
    (tmp_path / "config.yaml").write_text(configuration.dump(settings))
    planned = plan_experts([str(tmp_path)], "mini", ranks=2, nodes=1)
    assert planned.topology.slots == (4, 4) and planned.work.token_bytes == 2 * 512 * 2 * 2
    planned = plan_experts([str(tmp_path), "placement.slots=2"], "mini", ranks=2, nodes=1)
    assert planned.topology.slots == (2, 2)


def test_a_preset_and_given_loads(tmp_path):
    planned = plan_experts(["model.moe.layers=interval"], "uni-moe-7b-8e", ranks=4, nodes=2)
    assert [len(held) for held in planned.placement.layers[0]] == [2] * 4 and len(planned.placement.layers) == 16
    (tmp_path / "loads.json").write_text("[[9, 1, 1, 1]]")
    planned = plan_experts([str(tmp_path / "loads.json")], "mini", ranks=2, nodes=1)
    assert planned.placement.layers == (((0,), (1, 2, 3)),)


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["nowhere"], 1, "nowhere: no such run folder or file"),
        (["dense.jsonl"], 1, "dense.jsonl: no step of a mixture in it (no expert_load); only stage tune has one"),
        (["empty.jsonl"], 1, "empty.jsonl: no steps in it"),
        (["bad.json"], 2, "bad.json: loads are not [layers][experts] numbers from 0"),
        (["model.moe.layers=none"], 2, "model.moe.layers is 'none': the model has no mixture of experts"),
        (["--slots", "1"], 2, "4 experts do not fit into 2 slots on 2 ranks; allowed: at least 2 slots per rank"),
        (["--ranks", "0"], 2, "--ranks is 0; allowed: from 1"),
        (["--nodes", "3"], 2, "2 ranks cannot lie on 3 nodes; allowed: 1 to 2 nodes"),
        (["--reads", "image"], 2, "--reads image: write NODE=KIND or NODE=KIND,KIND, such as 0=image,video"),
        (["--reads", "1=all"], 2, "--reads 1=all: node 1 does not exist; allowed: 0 to 0"),
        (["--reads", "0=smell"], 2, "--reads 0=smell: no loads of 'smell'; allowed: all"),
        (["placement.slak=1"], 2, "unknown key 'placement.slak'; did you mean 'placement.slack'?"),
        (["a", "b"], 2, "'b' is one source too many; give one run folder or file"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, arguments, code, line):
    monkeypatch.chdir(tmp_path)
    write_metrics(tmp_path / "dense.jsonl", [step(1, "base", expert_load=None)])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.json").write_text('[["a"]]')
    assert fails(capsys, "plan-experts", *arguments) == (code, line)
