"""Official checkpoints in and out: every layout, strictly, tensor by tensor; mistakes name the file."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.official import eight_experts, four_experts, random_model, save, save_shards
from tests.tiny import make_servable_run
from tests.unit.test_cli import fails, prints
from unimoe_ray.cli import main
from unimoe_ray.convert import import_official
from unimoe_ray.errors import UnimoeError
from unimoe_ray.interop.official import names
from unimoe_ray.interop.official.write import write_official
from unimoe_ray.interop.stream import TensorWriter
from unimoe_ray.model.language import mixtures
from unimoe_ray.training.checkpoint import load_model

ROOT = Path(__file__).parents[2]
LAYOUTS = {
    "speech": lambda root: four_experts(root, "speech", "all"),
    "speech_dp": lambda root: four_experts(root, "speech", "interval"),
    "audio": lambda root: four_experts(root, "audio", "interval"),
    "safetensors": lambda root: four_experts(root, "audio", "all", suffix=".safetensors"),
    "8e": eight_experts,
}


def bring(folders, to):
    return import_official(folders, to, lambda done, total: None)


@pytest.fixture(params=LAYOUTS)
def official(request, tmp_path):
    return LAYOUTS[request.param](tmp_path / "official")


def test_every_layout_becomes_the_model_that_it_describes(official, tmp_path):
    report = bring(official.folders, tmp_path / "model")
    model, info, _ = load_model(tmp_path / "model")
    found = model.state_dict()
    for name, tensor in official.wanted.items():
        torch.testing.assert_close(found[name], tensor.float(), atol=1e-6, rtol=1e-6, msg=name)
    (new,) = report["new_connectors"]
    assert {name for name in found if name not in official.wanted} == {n for n in found if f"connectors.{new}." in n}
    assert not found[f"connectors.{new}.query_tokens"].any()
    assert info.sparse and mixtures(model)[0].num_experts == official.config["num_experts"]
    assert report == json.loads((tmp_path / "model" / "import_report.json").read_text())


def test_every_tensor_is_used_or_named(official, tmp_path):
    report = bring(official.folders, tmp_path / "model")
    ignored = {(entry["file"], entry["tensor"]) for entry in report["ignored"]}
    assert len(ignored) <= len(report["ignored"]) and set(official.ignored) <= {name for _, name in ignored}
    total = 0
    for folder in official.folders:
        for path in folder.iterdir():
            if path.name == "training_args.bin":
                assert report["files_not_read"] == [f"{folder.name}/{path.name}"]
            elif path.suffix in (".bin", ".safetensors"):
                total += len(torch.load(path, weights_only=True) if path.suffix == ".bin" else load_file(path))
    assert sum(report["used"].values()) + len(report["ignored"]) == total
    assert all(entry["reason"] for entry in report["ignored"])


def test_the_command_line(capsys, tmp_path):
    official = LAYOUTS["speech"](tmp_path / "official")
    to = tmp_path / "model"
    with pytest.raises(SystemExit) as stop:
        main(["import", "--from", "official", *map(str, official.folders), "--to", str(to)])
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and out.splitlines()[-1] == str(to) and "file 1 of " in err
    assert "tensors ignored: a constant of the rotary embedding, computed here" in out
    assert "training_args.bin not read" in out and "the audio connector is new" in out
    code, line = fails(capsys, "import", "--from", "official", *official.folders, "--to", to)
    assert (code, line) == (2, f"--to {to}: exists; give a folder that does not")
    assert prints(capsys, "export", to, "--format", "official", "--to", tmp_path / "again")


@pytest.mark.parametrize("differ", [False, True])
def test_export_then_import_is_bit_equal(official, tmp_path, differ):
    bring(official.folders, tmp_path / "model")
    model, info, _ = load_model(tmp_path / "model")
    if differ:  # what training may leave, and the official code has no place for
        apart = info.model | {"connectors": info.model["connectors"] | {"video": None}}
        info, shared = replace(info, model=apart), model
        model = info.build()
        model.load_state_dict(shared.state_dict())
        torch.nn.init.normal_(model.connectors["video"].projection[0].weight)
        torch.nn.init.normal_(model.connectors["audio"].query_tokens)
    out = tmp_path / "out"
    out.mkdir()
    write_official(model, out, max_shard_bytes=20_000)
    shutil.copy(tmp_path / "model" / "tokenizer.json", out)
    assert len(list(out.glob("model-*.safetensors"))) > 2
    assert (out / "mm_video_projector.safetensors").exists() == differ
    report = bring([out], tmp_path / "again")
    again, again_info, _ = load_model(tmp_path / "again")
    wanted, found = model.state_dict(), again.state_dict()
    assert wanted.keys() == found.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert again_info == info and report["new_connectors"] == []


def test_exported_names_are_those_of_the_4_expert_checkpoints(tmp_path):
    write_official(random_model("speech", 4, "all"), tmp_path)
    language = load_file(tmp_path / "model.safetensors")
    assert language.keys() == random_model("speech", 4, "all").language.state_dict().keys()
    assert set(load_file(tmp_path / "mm_projector.safetensors")) == {
        f"model.mm_projector.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")
    }
    assert "model.query_tokens" in load_file(tmp_path / "mm_speech_aligner.safetensors")
    assert "model.mm_audio_aligner.query_tokens" in load_file(tmp_path / "mm_audio_aligner.safetensors")


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_of_another_type(tmp_path, name, dtype):
    official = LAYOUTS["speech"](tmp_path / "official")
    bring(official.folders, tmp_path / "model")
    half = ["import", "--from", "official", *map(str, official.folders), "--to", str(tmp_path / "half")]
    with pytest.raises(SystemExit) as stop:
        main([*half, "--dtype", name])
    assert stop.value.code == 0
    whole, half = (load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "half"))
    assert whole.keys() == half.keys()
    assert all(half[key].dtype == dtype and torch.equal(half[key], whole[key].to(dtype)) for key in whole)
    sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("half", "model")]
    assert sizes[0] < 0.6 * sizes[1]
    model, *_ = load_model(tmp_path / "half")
    assert all(torch.equal(model.state_dict()[key], half[key].float()) for key in half)


def test_our_names_and_theirs_are_inverse():
    model = random_model("speech", 4, "interval")
    for name in model.state_dict():
        modality = name.split(".")[1] if name.startswith("connectors.") else None
        assert name in names.ours(names.official(name), modality)


def test_a_model_with_other_connectors_is_not_official(capsys, tmp_path):
    run = make_servable_run(tmp_path / "run")
    code, line = fails(capsys, "export", run.config.run_dir, "--format", "official", "--to", tmp_path / "to")
    assert (code, line) == (1, "the image connector is mlp with match_text_rms; the official one is mlp2x_gelu")


# Mistakes


def edit(path: Path, change) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def remove_shard(base, tuned):
    (base / "pytorch_model-00002-of-00003.bin").unlink()


def lose_a_tensor(base, tuned):
    edit(base / "pytorch_model-00001-of-00003.bin", lambda state: state.pop("model.embed_tokens.weight"))


def lose_a_connector(base, tuned):
    edit(tuned / "mm_audio_aligner.bin", dict.clear)
    edit(base / "mm_audio_aligner.bin", lambda state: state.pop("model.mm_audio_aligner.projector.bias"))


def other_shape(base, tuned):
    edit(tuned / "mlp_gates.bin", lambda state: state.update({"model.layers.1.mlp.gate.weight": torch.zeros(4, 5)}))


def unknown_tensor(base, tuned):
    edit(tuned / "mlp_gates.bin", lambda state: state.update({"model.surprise.weight": torch.zeros(4, 5)}))


def not_a_tensor(base, tuned):
    edit(base / "mm_projector.bin", lambda state: state.update({"epoch": 3}))


def half_an_adapter(base, tuned):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    edit(tuned / "adapter_model.bin", lambda state: state.pop(name))


def no_adapter_config(base, tuned):
    (tuned / "adapter_config.json").unlink()


def no_tokenizer(base, tuned):
    (base / "tokenizer.json").unlink()


def no_config(base, tuned):
    for folder in (base, tuned):
        (folder / "config.json").unlink()


def code_in_a_pickle(base, tuned):
    import os

    class Evil:
        def __reduce__(self):
            return os.system, ("touch /tmp/should-not-exist",)

    torch.save({"x": Evil()}, tuned / "mlp_gates.bin")


def cut_file(base, tuned):
    path = tuned / "mlp_gates.bin"
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (remove_shard, r"base: pytorch_model-00002-of-00003.bin is missing, one of 3 that pytorch_model.bin.index"),
        (lose_a_tensor, r"1 tensors are missing, such as model.embed_tokens.weight; .* in pytorch_model-\*.bin"),
        (lose_a_connector, r"1 tensors are missing, .*mm_audio_aligner.projector.bias; .* in mm_audio_aligner.bin"),
        (other_shape, r"mlp_gates.bin: model.layers.1.mlp.gate.weight is \(4, 5\), not \(4, 16\)"),
        (unknown_tensor, "mlp_gates.bin: model.surprise.weight is not a tensor of an official checkpoint"),
        (not_a_tensor, "mm_projector.bin: epoch is not a tensor"),
        (half_an_adapter, "q_proj.lora_A.weight has no counterpart"),
        (no_adapter_config, "adapter_model.bin: needs adapter_config.json"),
        (no_tokenizer, "base: tokenizer.model is missing"),
        (no_config, "base: config.json is missing"),
        (code_in_a_pickle, "mlp_gates.bin: not readable as weights only"),
        (cut_file, "mlp_gates.bin: not readable as weights only"),
    ],
)
def test_mistakes_name_the_file_and_leave_nothing(tmp_path, damage, reason):
    official = LAYOUTS["speech"](tmp_path / "official")
    damage(*official.folders)
    with pytest.raises(UnimoeError, match=reason) as error:
        bring(official.folders, tmp_path / "model")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["official"] and not Path("/tmp/should-not-exist").exists()


def test_a_missing_expert_file_is_named(tmp_path):
    official = eight_experts(tmp_path / "official")
    (official.folders[1] / "mlp_base4.bin").unlink()
    with pytest.raises(UnimoeError, match="4_mlp_experts.bin: .* adapts a weight that is in none of the files"):
        bring(official.folders, tmp_path / "model")
    for path in official.folders[2].glob("*_mlp_experts.bin"):
        path.unlink()
    with pytest.raises(UnimoeError, match="12 tensors are missing, .* they should be in mlp_base4.bin"):
        bring(official.folders, tmp_path / "model")


def test_files_of_old_versions_of_torch_are_read_too(tmp_path):
    """They can't be mapped."""
    official = LAYOUTS["audio"](tmp_path / "official")
    for folder in official.folders:
        for path in [*folder.glob("mlp*.bin"), *folder.glob("pytorch*.bin")]:
            torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    bring(official.folders, tmp_path / "model")
    found = load_model(tmp_path / "model")[0].state_dict()
    torch.testing.assert_close({name: found[name] for name in official.wanted}, official.wanted, atol=1e-6, rtol=1e-6)


def test_a_base_alone_is_a_model(tmp_path):
    official = LAYOUTS["audio"](tmp_path / "official")
    bring(official.folders[:1], tmp_path / "model")
    base = torch.load(official.folders[0] / "mm_projector.bin", weights_only=True)["model.mm_projector.0.weight"]
    connectors = load_model(tmp_path / "model")[0].connectors
    assert torch.equal(connectors["image"].projection[0].weight, base.float())
    assert torch.equal(connectors["video"].projection[0].weight, base.float())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_fm_block": True}, "config.json: use_fm_block True is not supported"),
        ({"mm_projector_type": "linear"}, "config.json: mm_projector_type linear is not supported"),
        ({"num_experts": 1}, "config.json: .*top_k is 2, but there are only 1 expert slots"),
        ({"hidden_size": None}, "config.json: hidden_size: "),
    ],
)
def test_settings_that_do_not_fit(tmp_path, change, reason):
    official = LAYOUTS["audio"](tmp_path / "official")
    (official.folders[1] / "config.json").write_text(json.dumps(official.config | change))
    with pytest.raises(UnimoeError, match=reason):
        bring(official.folders, tmp_path / "model")


def test_mixtures_must_be_placed_as_ours_can_be(tmp_path):
    official = LAYOUTS["speech"](tmp_path / "official")
    for path in official.folders[0].glob("pytorch_model-*.bin"):
        edit(path, lambda state: [state.pop(name) for name in list(state) if ".layers.1.mlp.experts" in name])
    (official.folders[1] / "adapter_model.bin").unlink()
    with pytest.raises(UnimoeError, match=r"mixtures in layers \[0, 2, 3\] of 4 are neither all"):
        bring(official.folders, tmp_path / "model")


# Memory

MEASURE = """
import re, sys
from pathlib import Path
from unimoe_ray.convert import import_official
def status(key):
    return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
import_official([Path(sys.argv[1])], Path(sys.argv[2]), lambda done, total: None)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
import_official([Path(sys.argv[3])], Path(sys.argv[4]), lambda done, total: None)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can't be measured here")
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_the_peak_of_memory_is_about_one_shard(tmp_path, suffix):
    """The first import, a small one, has loaded all code. The second is of 36 shards."""
    small = LAYOUTS["audio"](tmp_path / "small").folders[0]
    large = tmp_path / "large"
    shutil.copytree(small, large)
    for path in large.glob("pytorch_model*"):
        path.unlink()
    config = json.loads((large / "config.json").read_text())
    wide = config["intermediate_size"] = 80_000
    state = torch.load(small / "pytorch_model-00001-of-00003.bin", weights_only=True)
    state |= torch.load(small / "pytorch_model-00002-of-00003.bin", weights_only=True)
    state |= torch.load(small / "pytorch_model-00003-of-00003.bin", weights_only=True)
    for name in state:
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            state[name] = torch.zeros(wide, 16)
        if name.endswith("down_proj.weight"):
            state[name] = torch.zeros(16, wide)
    (large / "config.json").write_text(json.dumps(config))
    save_shards(state, large, 36, suffix)
    total, largest = 0, 0
    for path in large.glob("*-of-00036.*"):
        total, largest = total + path.stat().st_size, max(largest, path.stat().st_size)
    assert total > 150e6 and largest < 12e6
    command = [sys.executable, "-c", MEASURE, small, tmp_path / "a", large, tmp_path / "b"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    print(f"{suffix}: peak grew by {done.stdout.strip()} MiB, shards of at most {largest / 2**20:.0f}")
    assert float(done.stdout) < 3 * largest / 2**20


def test_the_writer_wants_every_tensor_once(tmp_path):
    shapes = {"a": (2, 3), "scalar": (), "empty": (0, 4)}
    with TensorWriter(tmp_path / "x.safetensors", shapes) as writer:
        writer.write("empty", torch.zeros(0, 4))
        writer.write("a", torch.arange(6.0).view(3, 2).T.bfloat16())
        for name, tensor in (("a", torch.zeros(2, 3)), ("scalar", torch.zeros(1)), ("b", torch.zeros(1))):
            with pytest.raises(ValueError, match="is not to be written"):
                writer.write(name, tensor)
        writer.write("scalar", torch.tensor(2.5))
    found = load_file(tmp_path / "x.safetensors")
    assert torch.equal(found["a"], torch.arange(6.0).view(3, 2).T) and found["scalar"] == 2.5
    with (
        pytest.raises(ValueError, match="3 tensors were not written, such as a"),
        TensorWriter(tmp_path / "y.safetensors", shapes),
    ):
        pass


def test_safetensors_are_taken_where_there_are_both(tmp_path):
    official = LAYOUTS["audio"](tmp_path / "official")
    gates = torch.load(official.folders[1] / "mlp_gates.bin", weights_only=True)
    save({name: tensor + 1 for name, tensor in gates.items()}, official.folders[1], "mlp_gates", ".safetensors")
    report = bring(official.folders, tmp_path / "model")
    state = load_model(tmp_path / "model")[0].language.state_dict()
    assert all(torch.equal(state[name], tensor + 1) for name, tensor in gates.items())
    assert "tuned/mlp_gates.bin" in report["files_not_read"]
