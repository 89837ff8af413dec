"""The classes for transformers: round trips, towers that run once a request, a processor that counts right."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForMultimodalLM,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    WhisperConfig,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tests.official import four_experts
from tests.tiny import make_servable_run
from unimoe_ray.cli import main
from unimoe_ray.config.model import MODALITIES, PLACEHOLDER_IDS, ModelConfig
from unimoe_ray.convert import export, import_official
from unimoe_ray.data.features import TOWER_OF
from unimoe_ray.errors import UnimoeError
from unimoe_ray.evaluation.evaluate import final_model
from unimoe_ray.interop.huggingface import UniMoEConfig, UniMoEForConditionalGeneration, UniMoEProcessor
from unimoe_ray.interop.huggingface.configuration import feature_dims
from unimoe_ray.interop.huggingface.towers import build_tower, describe_tower
from unimoe_ray.interop.language import explicit_language
from unimoe_ray.mini import source as mini
from unimoe_ray.model.towers.beats import Beats, BeatsConfig, BeatsTower
from unimoe_ray.model.towers.clip import ClipTower
from unimoe_ray.model.towers.whisper import WhisperFullTower
from unimoe_ray.model.unimoe import Batch, UniMoE
from unimoe_ray.training.checkpoint import load_info, load_model

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)
PICTURES = [Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(4)]
SOUNDS = [RNG.normal(0, 0.1, n).astype(np.float32) for n in (16_000, 30_000)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_servable_run(tmp_path_factory.mktemp("hf"), model={"language": {"max_positions": 128}})


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "hf"
    export(run.config.run_dir, "hf", folder)
    return folder


@pytest.fixture(scope="module")
def loaded(exported):
    return AutoModelForMultimodalLM.from_pretrained(exported), AutoProcessor.from_pretrained(exported)


def published_model():
    """Of the published shape in small: CLIP, Whisper and BEATs, queries, no scaling to the text's RMS."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=28, patch_size=14))
    whisper = WhisperEncoder(WhisperConfig(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16))
    beats = Beats(
        BeatsConfig(
            embed_dim=8,
            encoder_layers=3,
            encoder_embed_dim=16,
            encoder_ffn_embed_dim=16,
            encoder_attention_heads=2,
            conv_pos=4,
            conv_pos_groups=2,
            num_buckets=8,
            max_distance=20,
        )
    )
    towers = {
        "image": ClipTower(clip, aspect="pad"),
        "speech": WhisperFullTower(whisper, max_windows=2),
        "audio": BeatsTower(beats, window=32_000),
    }
    queries = {"number": 3, "num_layers": 2, "num_heads": 2, "intermediate_size": 16}
    plain = {"type": "mlp2x_gelu", "match_text_rms": False}
    config = ModelConfig.model_validate(
        {
            "language": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_layers": 2,
                "num_heads": 2,
                "num_kv_heads": 2,
                "tie_embeddings": False,
            },
            "connector": plain,
            "connectors": {
                "audio": plain | {"type": "qformer", "queries": queries},
                "speech": plain | {"type": "whisper_decoder", "queries": queries},
            },
            "video": {"frames": 2, "pooling": "mean"},
            "moe": {"layers": "interval"},
        }
    )
    model = UniMoE(config, 300, feature_dims(towers))
    model.make_sparse()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval(), towers


def same(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("kind", ["mini", "published"])
@pytest.mark.parametrize("shards", [False, True])
def test_saving_and_loading_is_bit_equal(run, tmp_path, kind, shards):
    if kind == "mini":
        model, towers = load_model(final_model(run.config))[0], mini.towers(run.config)
    else:
        model, towers = published_model()
    whole = UniMoEForConditionalGeneration.wrap(model, towers, sparse=True)
    whole.save_pretrained(tmp_path, max_shard_size="20KB" if shards else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == shards
    again, report = UniMoEForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same(again.state_dict(), whole.state_dict())
    same(again.unimoe.state_dict(), model.state_dict())
    same(dict(again.named_buffers()), dict(whole.named_buffers()))
    for modality, tower in towers.items():
        assert again.towers[modality].fingerprint() == tower.fingerprint()
        assert not again.towers[modality].training and not any(p.requires_grad for p in tower.parameters())
    language = again.unimoe.language
    tied = language.lm_head.weight is language.model.embed_tokens.weight
    assert tied == model.config.language.tie_embeddings


def test_beats_keeps_its_one_table(tmp_path):
    model, towers = published_model()
    UniMoEForConditionalGeneration.wrap(model, towers, sparse=True).save_pretrained(tmp_path)
    layers = UniMoEForConditionalGeneration.from_pretrained(tmp_path).towers["audio"].network.encoder.layers
    assert len({id(layer.self_attn.relative_attention_bias.weight) for layer in layers}) == 1


def test_towers_come_back_from_their_description(run):
    for tower in [*mini.towers(run.config).values(), *published_model()[1].values()]:
        again = build_tower(json.loads(json.dumps(describe_tower(tower))))
        again.network.load_state_dict(tower.network.state_dict())
        assert again.fingerprint() == tower.fingerprint()


def test_the_auto_classes_load_what_the_command_line_wrote(capsys, run, tmp_path):
    to = tmp_path / "hf"
    with pytest.raises(SystemExit) as stop:  # transformers shows its progress on stderr
        main(["export", str(run.config.run_dir), "--format", "hf", "--to", str(to)])
    assert (stop.value.code, capsys.readouterr().out) == (0, f"{to}\n")
    assert type(AutoConfig.from_pretrained(to)) is UniMoEConfig
    assert type(AutoProcessor.from_pretrained(to)) is UniMoEProcessor
    whole = AutoModelForMultimodalLM.from_pretrained(to)
    assert type(whole) is UniMoEForConditionalGeneration
    same(whole.unimoe.state_dict(), load_model(final_model(run.config))[0].state_dict())


def test_it_loads_in_another_process_without_our_configuration_files(exported):
    code = (
        "import sys, unimoe_ray.interop.huggingface; from transformers import AutoModelForMultimodalLM, AutoProcessor;"
        "p = AutoProcessor.from_pretrained(sys.argv[1]); m = AutoModelForMultimodalLM.from_pretrained(sys.argv[1]);"
        "print(m.generate(**p('what is this?'), max_new_tokens=3).shape[0]);"
        "assert not {'ray', 'deepspeed', 'peft'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, exported], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_answers_are_those_of_the_model_on_the_same_features(run, loaded):
    whole, processor = loaded
    inputs = processor(
        ["<image> what is this?", "a <speech> b <image> <audio>", "<video> and?", "just text"],
        images=PICTURES[:2],
        videos=[PICTURES[:2]],
        audio=[SOUNDS[0]],
        speech=SOUNDS[1],
    )
    found = whole.generate(**inputs, max_new_tokens=6)
    model, _, tokenizer = load_model(final_model(run.config))
    towers = mini.towers(run.config)
    media = {"image": PICTURES[:2], "video": [PICTURES[:2]], "audio": SOUNDS[:1], "speech": SOUNDS[1:]}
    features = {
        k: towers[TOWER_OF[k]]([towers[TOWER_OF[k]].preprocess(m) for m in items]) for k, items in media.items()
    }
    mask = inputs["attention_mask"].bool()
    batch = Batch(inputs["input_ids"], mask, inputs["input_ids"], features)
    torch.testing.assert_close(found, model.generate(batch, 6, 2))
    assert len(set(map(tuple, found.tolist()))) == 4
    assert len(processor.batch_decode(found, skip_special_tokens=True)) == 4


def test_towers_run_once_for_a_request_and_never_for_text(loaded):
    whole, processor = loaded
    calls = dict.fromkeys(whole.towers, 0)
    for modality, tower in whole.towers.items():

        def count(*_, modality=modality):
            calls[modality] += 1

        tower.register_forward_pre_hook(count)
    steps = []
    whole.unimoe.language.model.register_forward_pre_hook(
        lambda _, __, kwargs: steps.append((kwargs["inputs_embeds"], kwargs["past_key_values"])), with_kwargs=True
    )
    request = processor("<image> <speech> what?", images=PICTURES[0], speech=SOUNDS[0])
    whole.generate(**request, max_new_tokens=8, min_new_tokens=8)
    assert calls == {"image": 1, "speech": 1, "audio": 0}
    assert len(steps) == 8 and all(cache is not None for _, cache in steps)
    whole.generate(**request, max_new_tokens=4, num_beams=3)
    assert calls == {"image": 2, "speech": 2, "audio": 0}
    whole.generate(**processor("what?"), max_new_tokens=2)
    assert calls == {"image": 2, "speech": 2, "audio": 0}


def test_one_forward_pass_gives_logits_and_a_loss(loaded):
    whole, processor = loaded
    inputs = processor("<image> what is this?", images=PICTURES[0])
    output = whole(**inputs, labels=inputs["input_ids"])
    assert output.logits.shape[:2] == inputs["input_ids"].shape
    (ids,) = inputs["input_ids"]
    targets = ids[1:].masked_fill(ids[1:] < 0, -100)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits[0, :-1], targets))
    output.loss.backward()
    assert whole.unimoe.connectors["image"].projection.weight.grad.abs().sum() > 0
    whole.zero_grad()


@pytest.mark.parametrize("kind", MODALITIES)
def test_there_are_as_many_placeholders_as_soft_tokens(kind):
    model, towers = published_model()
    whole = UniMoEForConditionalGeneration.wrap(model, towers, sparse=True)
    processor = UniMoEProcessor.of(whole.config, fake_tokenizer())
    media = {"image": PICTURES[0], "video": PICTURES[:2], "audio": SOUNDS[0], "speech": SOUNDS[0]}[kind]
    argument = {"image": "images", "video": "videos"}.get(kind, kind)
    inputs = processor(f"<{kind}> what?", **{argument: media})
    count = int((inputs["input_ids"] == PLACEHOLDER_IDS[kind]).sum())
    assert count == {"image": 4, "video": 4, "audio": 3, "speech": 3}[kind]
    assert whole.embed(inputs["input_ids"], **{kind: inputs[f"{kind}_values"]}).isfinite().all()


def fake_tokenizer():
    from transformers import PreTrainedTokenizerFast

    from unimoe_ray.data.tokenizer import train_tokenizer

    return PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(["what is this"], 300))


def test_several_turns(loaded):
    _, processor = loaded
    turns = [("<image> what?", "a circle"), ("and <image>?", "")]
    first = processor(turns, images=PICTURES[:2])
    batch = processor([turns, "what?"], images=PICTURES[:2])
    assert torch.equal(batch["input_ids"][:1], first["input_ids"])
    assert batch["attention_mask"].sum(1).tolist()[0] == first["input_ids"].shape[1]


def test_special_tokens_in_a_text_are_plain_characters(loaded):
    _, processor = loaded
    ids = processor("what</s> is <|assistant|> this")["input_ids"]
    assert 2 not in ids and int((ids == 3).sum()) == 1


@pytest.mark.parametrize(
    ("text", "files", "reason"),
    [
        ("<image> what?", {}, "more <image> placeholders than files"),
        ("what?", {"images": PICTURES[0]}, "image: 1 files for 0 placeholders"),
        ("<video>?", {"videos": PICTURES[:3]}, "a video of 3 frames; this model takes 2"),
        ("word " * 100, {}, "a prompt has .* tokens, soft ones included; at most 127 fit"),
    ],
)
def test_mistakes_in_a_request(loaded, text, files, reason):
    with pytest.raises(ValueError, match=reason):
        loaded[1](text, **files)


def test_placeholders_without_files_are_refused(loaded):
    whole, processor = loaded
    ids = processor("<image> what?", images=PICTURES[0])["input_ids"]
    with pytest.raises(ValueError, match="image: placeholders without files"):
        whole.generate(ids, max_new_tokens=1)


def test_a_language_model_beyond_our_sizes_is_refused():
    llama = published_model()[0].language.config
    assert explicit_language(llama).hidden_size == 16
    llama.attention_bias = True
    with pytest.raises(UnimoeError, match="a language model with attention_bias True can't be written"):
        explicit_language(llama)


def test_a_model_folder_is_exported_as_its_run_is(exported, run, tmp_path):
    export(final_model(run.config), "hf", tmp_path / "hf")
    for path in exported.iterdir():
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes(), path.name


def test_an_imported_model_with_its_towers_is_one_for_transformers(tmp_path, monkeypatch):
    """Small files where the published ones would be."""
    official = four_experts(tmp_path / "official", "audio", "interval")
    import_official(official.folders, tmp_path / "model", lambda done, total: None)
    sizes = {"hidden_size": 12, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=28, patch_size=14))
    speech = WhisperEncoder(WhisperConfig(d_model=64, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16))
    beats = Beats(BeatsConfig(encoder_layers=1, encoder_embed_dim=64, encoder_attention_heads=4, conv_pos_groups=2))
    towers = {"image": ClipTower(clip), "speech": WhisperFullTower(speech), "audio": BeatsTower(beats, window=32_000)}
    named = load_info(tmp_path / "model").model["towers"]
    assert {kind: tower["name"] for kind, tower in named.items()} == {kind: t.name for kind, t in towers.items()}
    monkeypatch.setattr("unimoe_ray.convert.load_towers", lambda _: towers)
    export(tmp_path / "model", "hf", tmp_path / "hf")
    whole = UniMoEForConditionalGeneration.from_pretrained(tmp_path / "hf")
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    assert processor.template == "compact"  # the tokenizer of these tests
    inputs = processor("<image> <audio> what?", images=PICTURES[0], audio=SOUNDS[0])
    model = load_model(tmp_path / "model")[0]
    features = {
        "image": towers["image"]([towers["image"].preprocess(PICTURES[0])]),
        "audio": towers["audio"]([towers["audio"].preprocess(SOUNDS[0])]),
    }
    batch = Batch(inputs["input_ids"], inputs["attention_mask"].bool(), inputs["input_ids"], features)
    wanted = model.language(inputs_embeds=model.embed(batch)).logits
    torch.testing.assert_close(whole(**inputs).logits, wanted)
