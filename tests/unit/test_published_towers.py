"""Published towers from files in the real formats, with small random weights."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperModel,
)

from tests.tiny import tiny_config
from tests.unit.test_beats import TINY
from unimoe_ray.config import dump, load, parse
from unimoe_ray.config.model import TowersConfig
from unimoe_ray.data.features import encode_files
from unimoe_ray.errors import UnimoeError, UsageError
from unimoe_ray.model.towers.beats import Beats, BeatsTower
from unimoe_ray.model.towers.clip import ClipTower
from unimoe_ray.model.towers.whisper import WhisperFullTower
from unimoe_ray.towers import load_tower, load_towers

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 42,
    "patch_size": 14,
}
WHISPER = {
    **{f"{part}_{size}": n for part in ("encoder", "decoder") for size, n in (("layers", 2), ("ffn_dim", 24))},
    **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
    **{"d_model": 16, "max_source_positions": 50, "vocab_size": 9, "pad_token_id": 0},
    **{"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with clip, whisper and beats.pt, and the networks that were saved there."""
    root = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    clip, whisper = CLIPVisionModel(CLIPVisionConfig(**VISION)), WhisperModel(WhisperConfig(**WHISPER))
    beats = Beats(TINY)
    clip.save_pretrained(root / "clip")
    whisper.save_pretrained(root / "whisper")
    torch.save({"cfg": asdict(TINY) | {"dropout": 0.1}, "model": beats.state_dict()}, root / "beats.pt")
    return root, clip.eval(), whisper.eval(), beats.eval()


def config(root, **towers):
    chosen = {
        "image": {"name": "clip", "path": str(root / "clip")},
        "speech": {"name": "whisper", "path": str(root / "whisper"), "max_windows": 2},
        "audio": {"name": "beats", "path": str(root / "beats.pt"), "max_windows": 3},
    }
    return tiny_config(root, model={"towers": chosen | towers}, mini={"random_towers": True})


def test_features_are_those_of_the_networks_that_were_saved(files):
    root, clip, whisper, beats = files
    towers = load_towers(config(root))
    assert {m: tower.name for m, tower in towers.items()} == {"image": "clip", "speech": "whisper", "audio": "beats"}
    assert towers["speech"].max_windows == 2 and towers["audio"].max_windows == 3
    sound = np.random.default_rng(0).normal(0, 0.1, 20_000).astype(np.float32)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8))
    own = {"image": ClipTower(clip), "speech": WhisperFullTower(whisper.encoder, 2), "audio": BeatsTower(beats)}
    for modality, media in (("image", picture), ("speech", sound), ("audio", sound)):
        (found,), (wanted,) = (encode_files(t[modality], [media]) for t in (towers, own))
        np.testing.assert_array_equal(found.values, wanted.values)


def test_the_encoder_is_found_in_a_whole_model(files, tmp_path):
    """As published: CLIP with its text encoder, Whisper with its language head."""
    root, *_ = files
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(vision_config=VISION, text_config=text))
    whisper = WhisperForConditionalGeneration(WhisperConfig(**WHISPER))
    clip.save_pretrained(tmp_path / "clip")
    whisper.save_pretrained(tmp_path / "whisper")
    paths = {m: {"name": n, "path": str(tmp_path / n)} for m, n in (("image", "clip"), ("speech", "whisper"))}
    towers = load_towers(config(root, **paths))
    weight = "embeddings.patch_embedding.weight"
    assert torch.equal(towers["image"].network.state_dict()[weight], clip.vision_model.state_dict()[weight])
    assert torch.equal(towers["speech"].network.conv1.weight, whisper.model.encoder.conv1.weight)


def test_small_ones_and_published_ones_together(files):
    root, *_ = files
    towers = load_towers(config(root, image="efficientnet_lite0", speech={"name": "whisper_tiny_en"}))
    assert [towers[m].name for m in ("image", "speech", "audio")] == ["efficientnet_lite0", "whisper_tiny_en", "beats"]
    assert load_tower(config(root), "audio") is towers["audio"], "loaded once"


def test_a_name_alone_is_a_small_tower(tmp_path):
    """As runs of earlier versions say it."""
    names = {"image": "efficientnet_lite0", "speech": "whisper_tiny_en", "audio": "yamnet"}
    assert TowersConfig.model_validate(names) == TowersConfig()
    path = tmp_path / "config.yaml"
    path.write_text(dump(load("mini", ["model.towers.image=efficientnet_lite0"])))
    assert load(path) == load("mini")


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        ({"image": "clip"}, "model.towers.image.* clip needs a path: the folder or hub name of a CLIP model"),
        ({"audio": {"name": "beats"}}, "model.towers.audio: beats needs a path: the file of a BEATs checkpoint"),
        ({"image": "clp"}, "model.towers.image is 'clp': .*'efficientnet_lite0' or 'clip'"),
        ({"audio": {"path": "x.pt"}}, "model.towers.audio: yamnet takes no path; those that do: clip, whisper, beats"),
        ({"speech": {"max_windows": 3}}, "model.towers.speech: whisper_tiny_en takes no max_windows"),
        ({"image": {"name": "clip", "path": "x", "max_windows": 3}}, "unknown key 'model.towers.image.max_windows'"),
    ],
)
def test_mistakes_in_the_configuration(tower, message):
    with pytest.raises(UsageError, match=message):
        parse({"model": {"towers": tower}})


def wrong_files(root, tmp_path):
    """(modality, path, message)"""
    (tmp_path / "damaged").mkdir()
    for file in (root / "clip").iterdir():
        (tmp_path / "damaged" / file.name).write_bytes(file.read_bytes()[:200])
    (tmp_path / "damaged" / "config.json").write_bytes((root / "clip" / "config.json").read_bytes())
    cut = CLIPVisionModel(CLIPVisionConfig(**VISION | {"num_hidden_layers": 2}))
    cut.save_pretrained(tmp_path / "cut")
    (tmp_path / "cut" / "config.json").write_bytes((root / "clip" / "config.json").read_bytes())
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save([1], tmp_path / "list.pt")
    torch.save({"model": {}}, tmp_path / "model.pt")
    torch.save({"cfg": asdict(TINY), "model": {}}, tmp_path / "empty.pt")
    yield "image", tmp_path / "gone", "no such file or folder; clip wants the folder or hub name of a CLIP model"
    yield "image", tmp_path, "it has no config.json"
    yield "image", root / "whisper", "its config.json is of a 'whisper' model"
    yield "speech", root / "clip", "its config.json is of a 'clip_vision_model' model"
    yield "image", tmp_path / "damaged", "no clip weights that can be read .*header"
    yield "image", tmp_path / "cut", "16 tensors are missing or of another shape, such as .*layers.2"
    yield "audio", "BEATs.pt", "no such file or folder; beats wants the file of a BEATs checkpoint"
    yield "audio", "no/file", "no such file or folder"
    yield "audio", root / "clip", "Is a directory"
    yield "audio", tmp_path / "text.pt", "no beats weights that can be read"
    yield "audio", tmp_path / "list.pt", "a BEATs checkpoint holds cfg and model; this one holds a list"
    yield "audio", tmp_path / "model.pt", "a BEATs checkpoint holds cfg and model; this one holds model"
    yield "audio", tmp_path / "empty.pt", "Missing key.*patch_embedding"


def test_wrong_files_are_named_in_one_line(files, tmp_path):
    root, *_ = files
    names = {"image": "clip", "speech": "whisper", "audio": "beats"}
    for modality, path, message in wrong_files(root, tmp_path):
        chosen = config(root, **{modality: {"name": names[modality], "path": str(path)}})
        with pytest.raises(UnimoeError, match=rf"^model\.towers\.{modality}\.path: .*{message}") as error:
            load_tower(chosen, modality)
        assert "\n" not in str(error.value)
