"""States of a run as files: written by one world and read by another, damaged in every way, kept by policy."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tests.unit.checkpoints import DECIDES, World, random_state, write_state
from unimoe_ray.checkpoint import restore
from unimoe_ray.checkpoint.manifest import KINDS, MANIFEST, DamagedError, load
from unimoe_ray.checkpoint.states import (
    check_latest,
    damages,
    kept,
    kept_for_good,
    newest_first,
    strangers,
)
from unimoe_ray.checkpoint.storage import Folder
from unimoe_ray.config.checkpoint import CheckpointConfig
from unimoe_ray.errors import UsageError

LAYERS, EXPERTS = 2, 3
SHAPES = {
    "embed.weight": (7, 5),
    "connectors.image.scale": (),
    **{f"layers.{layer}.gate": (EXPERTS, 4) for layer in range(LAYERS)},
    **{
        f"layers.{layer}.experts.{expert}.{name}": shape
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
        for name, shape in (("up", (3, 4)), ("down", (4, 3)))
    },
}
ONE = World(1, 1, [[[0, 1, 2]]] * LAYERS)
TWO = World(2, 2, [[[0, 2], [1]], [[], [0, 1, 2]]])


@st.composite
def worlds(draw) -> World:
    ep = draw(st.integers(1, 3))
    placement = []
    for _ in range(LAYERS):
        owners = draw(st.lists(st.integers(0, ep - 1), min_size=EXPERTS, max_size=EXPERTS))
        placement.append([[e for e in range(EXPERTS) if owners[e] == rank] for rank in range(ep)])
    return World(ep * draw(st.integers(1, 3)), ep, placement)


@settings(max_examples=60, deadline=None)
@given(written=worlds(), read=worlds(), remote=st.booleans(), seed=st.integers(0, 99))
def test_what_one_world_wrote_every_other_reads(tmp_path_factory, written, read, remote, seed):
    folder = Folder(f"memory://states{seed}" if remote else str(tmp_path_factory.mktemp("states")))
    values = random_state(SHAPES, seed)
    write_state(folder, written, SHAPES, values, 20)
    (state,) = newest_first(folder)
    assert state.manifest.world == written.ranks and damages(state) == []
    for mine in read.fragments(SHAPES):
        wanted = [restore.Wanted(n, kind, start, torch.zeros(length)) for n, start, length in mine for kind in KINDS]
        restore.read(state, wanted)
        for want in wanted:
            expected = values[want.parameter][KINDS.index(want.kind), want.start : want.start + len(want.values)]
            assert torch.equal(want.values, expected)
    folder.remove()
    assert folder.names() == []


def test_a_part_is_a_safetensors_file_and_only_what_is_needed_of_it_is_read(tmp_path, monkeypatch):
    """Of a file with three long vectors, two far pieces: two reads besides its header, no more bytes than wanted."""
    values = {"a": torch.randn(3, 2**17)}
    state = write_state(Folder(str(tmp_path)), ONE, {"a": (2**17,)}, values, 20)
    with safe_open(Path(state.folder.location) / state.manifest.parts[0].name, framework="pt") as file:
        assert torch.equal(file.get_tensor("a/exp_avg"), values["a"][1])
    asked = []
    read = Folder.read
    monkeypatch.setattr(Folder, "read", lambda *given: asked.append(given[2:]) or read(*given))
    wanted = [restore.Wanted("a", "param", 100, torch.zeros(50)), restore.Wanted("a", "exp_avg", 9, torch.zeros(20))]
    restore.read(state, wanted)
    assert torch.equal(wanted[0].values, values["a"][0, 100:150])
    assert torch.equal(wanted[1].values, values["a"][1, 9:29])
    assert [stop - start for start, stop in asked[2:]] == [200, 80]


def test_long_pieces_are_read_block_by_block(tmp_path, monkeypatch):
    monkeypatch.setattr(restore, "BLOCK", 64)
    values = random_state(SHAPES, 0)
    state = write_state(Folder(str(tmp_path)), TWO, SHAPES, values, 20)
    wanted = [restore.Wanted(name, "exp_avg_sq", 0, torch.zeros(value.shape[1])) for name, value in values.items()]
    restore.read(state, wanted)
    assert all(torch.equal(want.values, values[want.parameter][2]) for want in wanted)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


DAMAGES = ["flip", "cut", "grow", "lose", "folder", "swap", "stale"]


def damage(state: Path, older: Path, dice: random.Random) -> str:
    """One random damage; the file that it concerns."""
    parts = sorted(path.name for path in state.glob("part-*"))
    of_manifest = dice.random() < 0.3
    kind = dice.choice(["flip", "cut", "lose", "stale"] if of_manifest else DAMAGES)
    name = MANIFEST if of_manifest else dice.choice(parts)
    path = state / name
    data = path.read_bytes()
    if kind == "flip":
        at = dice.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << dice.randrange(8))]) + data[at + 1 :])
    elif kind == "cut":
        path.write_bytes(data[: dice.randrange(len(data))])
    elif kind == "grow":
        path.write_bytes(data + bytes(dice.randrange(1, 100)))
    elif kind == "lose":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "swap":  # the file of another rank
        shutil.copy(state / next(other for other in parts if other != name), path)
    else:  # the manifest, or the part, of another step
        shutil.copy(older / name, path)
    return name


@pytest.mark.parametrize("seed", range(100))
def test_damages_are_found_and_named_and_the_state_before_is_used(seed, tmp_path, alone):
    dice = random.Random(seed)
    folder = Folder(str(tmp_path))
    older, newest = (write_state(folder, TWO, SHAPES, random_state(SHAPES, step), step) for step in (20, 40))
    name = damage(Path(newest.folder.location), Path(older.folder.location), dice)
    state, (warning,) = restore.find(folder, DECIDES)
    assert state == older
    assert newest.folder.location in warning and name in warning and len(warning.splitlines()) == 1


def test_a_stray_file_is_named_but_passes_over_no_good_state(tmp_path, alone):
    folder = Folder(str(tmp_path))
    state = write_state(folder, TWO, SHAPES, random_state(SHAPES, 0), 20)
    (Path(state.folder.location) / ".DS_Store").write_bytes(b"?")
    (tmp_path / "notes.txt").write_text("not a state")
    assert restore.find(folder, DECIDES) == (state, [])
    assert strangers(state) == [".DS_Store"]


def test_without_any_good_state_a_run_starts_again(tmp_path, alone):
    folder = Folder(str(tmp_path / "none"))
    assert restore.find(folder, DECIDES) == (None, [])
    state = write_state(folder, TWO, SHAPES, random_state(SHAPES, 0), 20)
    (Path(state.folder.location) / MANIFEST).unlink()
    found, (warning,) = restore.find(folder, DECIDES)
    assert found is None and "was passed over: it was not committed: it has no manifest.json" in warning


def test_a_state_of_other_settings_is_refused_with_the_key(tmp_path, alone):
    folder = Folder(str(tmp_path / "runs" / "tune"))
    write_state(folder, ONE, SHAPES, random_state(SHAPES, 0), 20)
    other = DECIDES | {"stages.tune.tune.batch_size": 32, "data plan": "1" * 64}
    for check in (restore.find, check_latest):
        with pytest.raises(UsageError, match=r"of step 20 was made with stages.tune.tune.batch_size=48, now it is 32;"):
            check(folder, other)
    with pytest.raises(UsageError, match=r"with another data plan; go on .*, or remove .*runs/tune to train anew"):
        check_latest(folder, DECIDES | {"data plan": "1" * 64})
    assert check_latest(folder, DECIDES) == 20


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 2}, r"no version known here \(format"),
        ({"step": 0}, r"no version known here \(step"),
        ({"extra": 1}, r"no version known here \(extra"),
        ({"placement": [[[0, 1], [1]]]}, "the placement does not hold every expert once"),
        ({"parameters": {"embed.weight": [8, 5]}}, "fragments of connectors.image.scale do not fit together"),
        ({"parameters": {**{n: list(s) for n, s in SHAPES.items()}, "more": [1]}}, "more is not whole"),
    ],
)
def test_a_manifest_that_does_not_hold_together_is_refused(tmp_path, change, reason):
    """However well its checksum matches."""
    state = write_state(Folder(str(tmp_path)), TWO, SHAPES, random_state(SHAPES, 0), 20)
    body = json.loads(state.manifest.dump())["state"] | change
    with pytest.raises(DamagedError, match=reason):
        load(_sealed(body))


def test_no_file_outside_a_state_is_read(tmp_path):
    state = write_state(Folder(str(tmp_path)), ONE, SHAPES, random_state(SHAPES, 0), 20)
    body = json.loads(state.manifest.dump())["state"]
    body["parts"][0]["name"] = "../../../etc/passwd"
    with pytest.raises(DamagedError, match=r"parts.0.name"):
        load(_sealed(body))


def _sealed(body: dict) -> bytes:
    canonical = lambda value: json.dumps(value, sort_keys=True, separators=(",", ":")).encode()  # noqa: E731
    return canonical({"sha256": hashlib.sha256(canonical(body)).hexdigest(), "state": body})


def test_states_are_kept_for_what_they_are():
    policy = CheckpointConfig(keep_last=2, keep_every=40, keep_best=1)
    steps, losses = [20, 40, 60, 80, 100], {20: 0.5, 60: 0.4, 100: 0.6}
    assert kept(steps, losses, policy) == {80: ["last", "every 40"], 100: ["last"], 40: ["every 40"], 60: ["best"]}
    assert kept_for_good(steps, losses, policy) == {40: ["every 40"], 80: ["every 40"], 60: ["best"]}
    assert kept([20], {}, CheckpointConfig()) == {20: ["last"]} and kept_for_good([20], {}, CheckpointConfig()) == {}


def test_a_crash_while_a_manifest_is_put_leaves_the_old_one_or_none(tmp_path):
    """A process that may write no more than 4096 bytes to a file stands for a full disk."""
    code = (
        "import resource, sys; from unimoe_ray.checkpoint.storage import Folder\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "Folder(sys.argv[1]).put('manifest.json', b'0' * 4096)\n"
        "try:\n    Folder(sys.argv[1]).put('manifest.json', b'1' * 5000)\n"
        "except OSError as error:\n    print(error.errno)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) == 27 and (tmp_path / "manifest.json").read_bytes() == b"0" * 4096


def test_folders_behind_urls_list_read_and_remove_as_local_ones(tmp_path):
    MemoryFileSystem.store.clear()
    for folder in (Folder(str(tmp_path / "a")), Folder("memory://a"), Folder((tmp_path / "b").as_uri())):
        assert folder.names() == [] and folder.name in ("a", "b")
        (folder / "inner").make()
        with (folder / "inner").create("x") as file:
            file.write(b"0123456789")
        (folder / "inner").put("y", b"y")
        assert folder.names() == ["inner"] and (folder / "inner").names() == ["x", "y"]
        assert (folder / "inner").size("x") == 10 and (folder / "inner").read("x", 2, 5) == b"234"
        assert list((folder / "inner").chunks("x", 4)) == [b"0123", b"4567", b"89"]
        with pytest.raises(FileNotFoundError):
            folder.read("z")
        (folder / "inner").remove_file("y")
        assert (folder / "inner").names() == ["x"]
        folder.remove()
        assert folder.names() == []
        folder.remove()
