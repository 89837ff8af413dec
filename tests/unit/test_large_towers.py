"""CLIP and the whole Whisper encoder, at small sizes, against the classes of transformers."""

import time

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel, WhisperConfig, WhisperFeatureExtractor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from unimoe_ray.errors import UnimoeError
from unimoe_ray.model.features import Tower
from unimoe_ray.model.towers.clip import ClipTower
from unimoe_ray.model.towers.whisper import WhisperFullTower


def clip_network(**sizes) -> CLIPVisionModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2} | sizes
    return CLIPVisionModel(CLIPVisionConfig(**{"image_size": 42, "patch_size": 14} | sizes)).eval()


def whisper_encoder(**sizes) -> WhisperEncoder:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24} | sizes
    return WhisperEncoder(WhisperConfig(**{"max_source_positions": 50} | sizes)).eval()


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def sound(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


@pytest.mark.parametrize("layer", [-1, -2, -4])
@torch.no_grad()
def test_clip_takes_a_hidden_layer_without_the_class_token(layer):
    windows = torch.randn(3, 3, 42, 42)
    if layer == -4:
        with pytest.raises(ValueError, match="select_layer is -4; allowed: -3 to -1"):
            ClipTower(clip_network(), select_layer=layer)
        return
    network = clip_network()
    wanted = network(windows, output_hidden_states=True).hidden_states[layer][:, 1:]
    tower = ClipTower(network, select_layer=layer)
    torch.testing.assert_close(tower.encode(windows), wanted, atol=0, rtol=0)
    assert len(network.encoder.layers) == 3 + 1 + layer


@pytest.mark.parametrize("size", [(42, 42), (100, 60), (31, 77), (200, 43), (20, 20)])
def test_clip_crops_as_its_processor(size):
    image = picture(*size)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42})
    theirs = processor(image, return_tensors="np").pixel_values
    np.testing.assert_allclose(ClipTower(clip_network()).preprocess(image), theirs, atol=1e-5)


def test_clip_pads_with_the_mean_colour():
    tower = ClipTower(clip_network(), aspect="pad")
    red = Image.new("RGB", (42, 14), (255, 0, 0))
    (pixels,) = tower.preprocess(red)
    assert np.abs(pixels[:, :12]).max() < 0.02 and np.abs(pixels[:, 30:]).max() < 0.02
    assert pixels[0, 21, 21] > 1 and pixels[1, 21, 21] < -1


def test_whisper_equals_hugging_face_and_loses_no_sample():
    encoder = whisper_encoder()
    tower = WhisperFullTower(encoder)
    wave = sound(16_000 * 2 + 700)
    windows = tower.preprocess(wave)
    extractor = WhisperFeatureExtractor(chunk_length=1)
    for index in range(3):
        part = wave[16_000 * index : 16_000 * (index + 1)]
        theirs = extractor(part, sampling_rate=16_000, return_tensors="np").input_features
        np.testing.assert_allclose(windows[index : index + 1], theirs, atol=2e-5)
    with torch.no_grad():
        wanted = encoder(torch.from_numpy(windows)).last_hidden_state
    torch.testing.assert_close(tower([windows]).values, wanted, atol=1e-6, rtol=1e-6)


def test_whisper_cuts_with_a_warning():
    tower = WhisperFullTower(whisper_encoder(), max_windows=2)
    with pytest.warns(UserWarning, match=r"a sound of 3\.5 s has more than 2 windows of 1 s: the last 1\.5 s were cut"):
        windows = tower.preprocess(sound(56_000))
    assert len(windows) == 2 and tower.tokens_for(sound(56_000)) == [50, 50]
    with pytest.raises(UnimoeError, match="no samples"):
        tower.preprocess(sound(0))


def towers() -> dict:
    return {
        "clip": (ClipTower(clip_network()), [picture(50, 60), [picture(42, 42, 1), picture(80, 43, 2)], picture(9, 9)]),
        "whisper": (WhisperFullTower(whisper_encoder()), [sound(20_000), sound(100, 1), sound(16_000, 2)]),
    }


@pytest.mark.parametrize("name", towers())
def test_tower_contract(name):
    tower, media = towers()[name]
    assert isinstance(tower, Tower) and tower.name == name
    batch = [tower.preprocess(item) for item in media]
    features = tower(batch)
    tokens = [tower.tokens_for(item) for item in media]
    assert features.lengths.tolist() == [count for windows in tokens for count in windows]
    assert features.owner.tolist() == [index for index, windows in enumerate(tokens) for _ in windows]
    assert features.values.shape[2] == tower.feature_dim == 16
    for index, windows in enumerate(batch):
        assert windows.dtype == np.float32
        alone = tower([windows]).values
        torch.testing.assert_close(features.values[features.owner == index], alone, atol=1e-5, rtol=1e-5)


def cpu_seconds(run) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "whisper"])
@torch.no_grad()
def test_a_tower_costs_what_its_network_costs(name):
    """A batch of 8: at most 1.1 times the CPU time of transformers' module alone, when all layers run."""
    if name == "clip":
        sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
        network, tower = (clip_network(image_size=224, **sizes) for _ in range(2))
        tower = ClipTower(tower, select_layer=-1)
        batch = [tower.preprocess(picture(224, 224, seed)) for seed in range(8)]
    else:
        sizes = {"d_model": 256, "encoder_ffn_dim": 1024, "encoder_attention_heads": 4, "encoder_layers": 3}
        network = whisper_encoder(max_source_positions=1500, **sizes)
        tower = WhisperFullTower(network)
        batch = [tower.preprocess(sound(480_000, seed)) for seed in range(8)]
    stacked = torch.from_numpy(np.concatenate(batch))
    pairs = [(cpu_seconds(lambda: tower(batch)), cpu_seconds(lambda: network(stacked))) for _ in range(5)]
    ours, theirs = (min(times) for times in zip(*pairs, strict=True))
    assert ours <= 1.1 * theirs, f"{ours:.3f} s, transformers {theirs:.3f} s"
