"""Parameters counted on the meta device: the paper's table, published parts, and what a dry run says."""

import resource
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig

from tests.tiny import tiny_config
from tests.unit.test_published_towers import config as with_towers
from tests.unit.test_published_towers import files  # noqa: F401
from unimoe_ray.cli import main
from unimoe_ray.config import load, parse
from unimoe_ray.model.sizes import active_per_token, total
from unimoe_ray.model.unimoe import UniMoE
from unimoe_ray.parameter_table import count_parameters, parameter_table

# Uni-MoE, table 9, in billions: preset, moe.layers, total, activated.
PUBLISHED = [
    ("uni-moe-7b-4e", "interval", "13.2", "8.9"),
    ("uni-moe-7b-4e", "all", "19.7", "11.1"),
    ("uni-moe-7b-8e", "interval", "21.9", "8.9"),
    ("uni-moe-7b-8e", "all", "37.0", "11.1"),
]


@pytest.mark.parametrize(("preset", "layers", "all_of_them", "active"), PUBLISHED)
def test_language_models_have_the_published_sizes(preset, layers, all_of_them, active):
    started, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sizes = count_parameters(load(preset, [f"model.moe.layers={layers}"]))
    assert f"{sizes.language / 1e9:.1f}" == all_of_them and f"{sizes.active / 1e9:.1f}" == active
    assert time.process_time() - started < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 500_000, "kB: the model itself has 50 GB"


def test_other_parts_have_the_published_sizes():
    sizes = count_parameters(load("uni-moe-7b-4e", ["model.moe.layers=all"]))
    millions = {name: round(count / 1e6, 2) for name, count in sizes.connectors.items()}
    # The published speech connector holds Whisper's table of 51,865 tokens besides, which nothing reads.
    speech = round((156.77e6 - 51_865 * 768) / 1e6, 2)
    assert millions == {"image": 20.98, "video": 0, "audio": 102.43, "speech": pytest.approx(speech, abs=0.011)}
    # CLIP without its last layer (the tower takes the one before): 303.5 M with it.
    towers = {name: round(count / 1e6) for name, count in sizes.towers.items()}
    assert towers == {"image": 291, "speech": 88, "audio": 90}
    attention, experts = 32 * 4 * 8 * 8192, 32 * 4 * 3 * 8 * (4096 + 11008)
    connectors = 20.98e6 + 2 * (768 * 4096 + 4096)
    router = 32 * 4 * 4096
    assert sizes.trained["tune"] == pytest.approx(attention + experts + router + connectors, rel=1e-3)
    assert sizes.trained["align/audio"] == sizes.connectors["audio"]


@pytest.mark.parametrize("tied", [True, False])
def test_counting_a_model_in_memory(tied):
    model = UniMoE(
        tiny_config(
            Path("."), model={"language": {"tie_embeddings": tied}, "moe": {"layers": "interval", "top_k": 1}}
        ).model,
        300,
        {"image": 6, "video": 6, "audio": 10, "speech": 8},
    )
    dense = total(model.language)
    assert dense == active_per_token(model.language)
    model.make_sparse()
    feed_forward, router = 3 * 16 * 24, 4 * 16
    assert total(model.language) == dense + 3 * feed_forward + router
    assert active_per_token(model.language) == dense + router
    assert sum(p.numel() for p in {id(p): p for p in model.language.parameters()}.values()) == total(model.language)


def test_sizes_are_those_of_the_files_that_are_here(files, tmp_path):  # noqa: F811
    root, clip, whisper, beats = files
    LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4
    ).save_pretrained(tmp_path / "llama")
    settings = with_towers(root)
    settings.model.language.pretrained = str(tmp_path / "llama")
    sizes = count_parameters(settings)
    assert sizes.towers["image"] == total(clip) - total(clip.encoder.layers[-1])
    assert sizes.towers["speech"] == total(whisper.encoder) and sizes.towers["audio"] == total(beats)
    experts = 3 * 4 * 3 * 32 * 40
    attention, norms, embeddings, routers = 3 * 4 * 32 * 32, 7 * 32, 2 * 50 * 32, 3 * 4 * 32
    assert sizes.language == experts + attention + norms + embeddings + routers


def test_a_dry_run_of_training_prints_the_table_as_comments(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["train", "all", "--config", "uni-moe-7b-4e", "--dry-run", "model.moe.layers=all"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    shown = parse(yaml.safe_load(out))
    assert shown == load("uni-moe-7b-4e", ["model.moe.layers=all"])
    comments = [line for line in out.splitlines() if line.startswith("#")]
    assert any(line.split()[1:8] == ["language", "model", "with", "routers", "19.7", "B", "11.1"] for line in comments)
    for line in ("connector: speech", "tower: audio, beats", "trained in align/speech", "trained in tune"):
        assert any(comment.startswith(f"# {line} ") for comment in comments)
    assert list(tmp_path.iterdir()) == []


def test_every_preset_is_counted_without_touching_the_default_device():
    for preset in ("mini", "uni-moe-7b-8e"):
        config = load(preset)
        lines = parameter_table(config)
        trained = [f"trained in {stage}" for stage in ("align", "experts", "tune")]
        assert all(any(line.startswith(start) for line in lines) for start in trained)
    assert torch.empty(1).device.type == "cpu"
