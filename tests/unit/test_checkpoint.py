"""Model folders: what is saved comes back, what is damaged is not complete, mistakes name the folder."""

import json

import pytest
import torch
from safetensors import safe_open

from tests.tiny import make_servable_run, make_tiny_run
from unimoe_ray.errors import UnimoeError
from unimoe_ray.training.checkpoint import (
    checkpoint_dir,
    is_complete,
    load_info,
    load_model,
    load_weights,
    read_weights,
    save_model,
)
from unimoe_ray.training.stages import start_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def saved(run, tmp_path):
    torch.manual_seed(0)
    model = start_model(run.config, run.info, "tune")
    info = type(run.info)(**run.info.__dict__ | {"sparse": True})
    save_model(tmp_path / "tune", model, info, run.tokenizer, "how")
    return tmp_path / "tune", model, info


def test_a_sparse_model_comes_back(saved):
    folder, model, info = saved
    loaded, loaded_info, tokenizer = load_model(folder)
    assert loaded_info == info and not loaded.training
    state, found = model.state_dict(), loaded.state_dict()
    assert state.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert tokenizer.encode("</s>", add_special_tokens=False).ids != [2]
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_tied_weights_are_stored_once_and_stay_tied(saved):
    folder, _, _ = saved
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "language.model.embed_tokens.weight" in names and "language.lm_head.weight" not in names
    language = load_model(folder)[0].language
    assert language.lm_head.weight is language.model.embed_tokens.weight


def test_folders_of_stages(run):
    root = run.config.run_dir
    assert checkpoint_dir(root, "tune", "tune") == root / "checkpoints" / "tune"
    assert checkpoint_dir(root, "experts", "image") == root / "checkpoints" / "experts-image"


def test_complete_only_by_its_own_recipe(saved):
    folder, _, _ = saved
    assert is_complete(folder) and is_complete(folder, "how") and not is_complete(folder, "other")
    assert not is_complete(folder / "missing")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_any_damage_makes_it_incomplete(saved, name, damage):
    folder, _, _ = saved
    path = folder / name
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "cut" else bytes([content[0] ^ 1]) + content[1:])
    assert not is_complete(folder) and not is_complete(folder, "how")
    with pytest.raises(UnimoeError, match="not a complete model folder") as error:
        load_model(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        "3",
        "null",
        '{"files": []}',
        '{"files": {}, "recipe": 3}',
        "{}",
    ],
)
def test_odd_manifests(saved, manifest):
    folder, _, _ = saved
    (folder / "manifest.json").write_text(manifest)
    assert not is_complete(folder, "how")


def test_saving_again_replaces_and_a_killed_save_is_not_seen(saved, run):
    folder, model, info = saved
    half = folder.with_name(f".{folder.name}.1")
    half.mkdir()
    (half / "manifest.json").write_text(json.dumps({"recipe": "how", "files": {}}))
    (folder / "old").write_text("x")
    with torch.no_grad():
        model.connectors["image"].projection.bias.fill_(7)
    save_model(folder, model, info, run.tokenizer, "again")
    assert is_complete(folder, "again") and not (folder / "old").exists()
    assert load_model(folder)[0].connectors["image"].projection.bias.eq(7).all()


@pytest.mark.parametrize("tied", [True, False])
def test_loading_makes_no_random_numbers(tmp_path, tied):
    run = make_servable_run(tmp_path, model={"language": {"tie_embeddings": tied}})
    folder = checkpoint_dir(run.config.run_dir, "tune", "tune")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model, info, _ = load_model(folder)
    assert torch.equal(torch.get_rng_state(), before)
    wanted = info.build()
    load_weights(wanted, folder)
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.state_dict().items())
    for (name, a), (_, b) in zip(model.named_buffers(), wanted.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    embedding, head = model.language.get_input_embeddings(), model.language.get_output_embeddings()
    assert (embedding.weight is head.weight) == tied


def test_missing_folder(tmp_path):
    with pytest.raises(UnimoeError, match="nothing: no such model folder"):
        load_info(tmp_path / "nothing")


def test_unreadable_weights(tmp_path):
    with pytest.raises(UnimoeError, match="model.safetensors"):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(UnimoeError, match="model.safetensors"):
        read_weights(tmp_path)


def test_weights_of_another_model_are_refused(saved, run):
    folder, _, _ = saved
    dense = run.info.build()
    with pytest.raises(UnimoeError, match="tune: the weights do not fit the configuration"):
        load_weights(dense, folder)
    with pytest.raises(UnimoeError, match="align: the weights do not fit .*language.model.layers.0.mlp"):
        sparse = run.info.build()
        sparse.make_sparse()
        load_weights(sparse, checkpoint_dir(run.config.run_dir, "align", "align"))


def test_weights_of_another_size_are_refused(run):
    tree = json.loads(json.dumps(run.info.model))
    tree["language"]["intermediate_size"] = 32
    wider = type(run.info)(**run.info.__dict__ | {"model": tree}).build()
    folder = checkpoint_dir(run.config.run_dir, "align", "align")
    with pytest.raises(UnimoeError, match="align: the weights do not fit the configuration"):
        load_weights(wider, folder)
