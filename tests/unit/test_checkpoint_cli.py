"""``unimoe checkpoint``: what it says of good, damaged and unfinished states, here and in a bucket."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.tiny import tiny_config
from tests.unit.checkpoints import World, random_state, write_state
from unimoe_ray.checkpoint.manifest import MANIFEST
from unimoe_ray.checkpoint.states import State, latest, states_folder
from unimoe_ray.cli import main
from unimoe_ray.config import Config, load_run, parse
from unimoe_ray.errors import UsageError
from unimoe_ray.pipeline import open_run

SHAPES = {"gate": (3, 4), "layers.0.experts.0.up": (5, 4), "layers.0.experts.1.up": (5, 4)}
SPREAD = World(2, 2, [[[1], [0]], [[1], [0]], [[0, 1], []]])


def make_run(root: Path, **checkpoint) -> tuple[Config, dict[str, State]]:
    """A run with four states of stage 3, of steps 20 to 80, and one of stage 2."""
    config = tiny_config(
        root, checkpoint={"keep_every": 40, "keep_best": 1} | checkpoint, training={"validation": {"every": 20}}
    )
    with open_run(config):
        pass
    made = {}
    for step, loss in ((20, 0.5), (40, None), (60, 0.75), (80, None)):
        folder = states_folder(config, "tune", "tune")
        state = write_state(folder, SPREAD, SHAPES, random_state(SHAPES, step), step, validation=loss)
        made[f"tune/{state.folder.name}"] = state
    folder = states_folder(config, "experts", "image")
    state = write_state(folder, World(1, 1, [[[0, 1]]]), SHAPES, random_state(SHAPES, 0), 20)
    return config, made | {f"experts-image/{state.folder.name}": state}


def run(capsys, *arguments) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(["checkpoint", *map(str, arguments)])
    out, err = capsys.readouterr()
    return stop.value.code, out + err


def test_states_are_listed_with_what_keeps_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    config, made = make_run(tmp_path)
    (states_folder(config, "tune", "tune") / "step-00000100-0a1b2c").make()
    code, out = run(capsys, "list", config.run_dir, "--json")
    listed = {one["name"]: one for one in json.loads(out)["states"]}
    assert code == 0 and listed.keys() == made.keys() | {"tune/step-00000100-0a1b2c"}
    why = {name.split("-")[-2]: one["kept"] for name, one in listed.items() if one["committed"] and "tune" in name}
    assert why == {
        "00000020": ["best"],
        "00000040": ["every 40"],
        "00000060": ["last"],
        "00000080": ["last", "every 40"],
    }
    newest = listed["tune/step-00000080-0a1b2c"]
    assert newest["step"] == 80 and newest["workers"] == 2
    files = [path for path in Path(newest["location"]).iterdir() if path.name != MANIFEST]
    assert newest["bytes"] == sum(path.stat().st_size for path in files)
    code, out = run(capsys, "list", config.run_dir)
    (line,) = [line for line in out.splitlines() if "step-00000080" in line]
    assert code == 0 and "80 of 100" in line and "last, every 40" in line
    assert "it was not committed: it has no manifest.json" in out and all(name in out for name in made)


def test_verify_names_each_damage_and_fails(tmp_path, capsys):
    config, made = make_run(tmp_path)
    code, out = run(capsys, "verify", config.run_dir)
    assert code == 0 and sorted(out.splitlines()) == [f"good     {name}" for name in sorted(made)]
    flipped, cut, stray = (Path(made[f"tune/step-000000{step}-0a1b2c"].folder.location) for step in (20, 40, 60))
    data = (flipped / "part-00001-of-00002.safetensors").read_bytes()
    (flipped / "part-00001-of-00002.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (cut / MANIFEST).write_bytes((cut / MANIFEST).read_bytes()[:100])
    (stray / "notes.txt").write_text("?")
    (states_folder(config, "tune", "tune") / "step-00000100-0a1b2c").make()
    code, out = run(capsys, "verify", config.run_dir)
    assert code == 1 and {line for line in out.splitlines() if not line.startswith("good")} == {
        "         tune/step-00000100-0a1b2c: it was not committed: it has no manifest.json",
        "         tune/step-00000060-0a1b2c: notes.txt is no file of it",
        "DAMAGED  tune/step-00000040-0a1b2c: manifest.json is not one, or its end is missing",
        "DAMAGED  tune/step-00000020-0a1b2c: part-00001-of-00002.safetensors does not match its checksum",
    }
    code, out = run(capsys, "verify", config.run_dir, "--json")
    assert code == 1 and sum(len(one["damages"]) for one in json.loads(out)["states"]) == 2


def test_inspect_shows_what_is_in_a_state(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    config, made = make_run(tmp_path)
    code, out = run(capsys, "inspect", config.run_dir)
    assert code == 0
    for text in (
        "80 of 100",
        "2 workers",
        "3 with 52 values",
        "layers 1 to 2: 1 | 0",
        "layer 3: 0 1 | -",
        "5 x 4",
        "0, 1",
    ):
        assert text in out, text
    code, out = run(capsys, "inspect", config.run_dir, "experts", "--json")
    found = json.loads(out)
    assert code == 0 and found["location"] == made["experts-image/step-00000020-0a1b2c"].folder.location
    assert found["parameters"] == {name: list(shape) for name, shape in SHAPES.items()} and found["step"] == 20
    code, out = run(capsys, "inspect", config.run_dir, "base")
    assert code == 2 and out.startswith(
        "unimoe: there is no state 'base'; allowed: experts-image/step-00000020-0a1b2c, "
    )


def test_a_run_without_states_and_a_folder_without_a_run(tmp_path, capsys):
    config = tiny_config(tmp_path)
    with open_run(config):
        pass
    assert run(capsys, "verify", config.run_dir) == (0, "there is no state: no run was interrupted\n")
    assert run(capsys, "inspect", config.run_dir)[0] == 2
    assert run(capsys, "list", tmp_path) == (1, f"unimoe: {tmp_path}: no such run folder (it has no config.yaml)\n")


def test_states_lie_where_the_configuration_says(tmp_path, capsys, monkeypatch):
    """A bucket has a folder for each run; a relative folder is found again from anywhere."""
    MemoryFileSystem.store.clear()
    config, made = make_run(tmp_path, location="memory://bucket/states/")
    assert all(state.folder.location.startswith("memory://bucket/states/tiny/") for state in made.values())
    assert latest(config, "tune", "tune") == 80 and latest(config, "base", "base") is None
    assert run(capsys, "verify", config.run_dir)[0] == 0
    monkeypatch.chdir(tmp_path)
    config, made = make_run(tmp_path / "b", location="elsewhere")
    assert (tmp_path / "elsewhere" / "tiny" / "tune").is_dir()
    monkeypatch.chdir("/")
    assert latest(load_run(config.run_dir), "tune", "tune") == 80


def test_settings_of_states(tmp_path):
    assert (
        states_folder(tiny_config(tmp_path), "experts", "image").location
        == f"{tmp_path}/runs/tiny/states/experts-image"
    )
    for settings, message in (
        ({"keep_best": 1}, r"checkpoint.keep_best goes by validation losses: set training.validation.every"),
        ({"on_error": "ignore"}, r"checkpoint.on_error is 'ignore': Input should be 'warn' or 'stop'"),
        ({"keep_last": 0}, r"checkpoint.keep_last is 0: .* greater than or equal to 1"),
        ({"evry": 1}, r"unknown key 'checkpoint.evry'; did you mean 'checkpoint.every'"),
    ):
        with pytest.raises(UsageError, match=message):
            parse({"checkpoint": settings})
