"""BEATs: its front end and encoder against slow computations of their own, and the tower's windows."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from unimoe_ray.errors import UnimoeError
from unimoe_ray.model.features import Tower
from unimoe_ray.model.towers.beats import Beats, BeatsConfig, BeatsTower, load_beats, reduce_padding, relative_buckets
from unimoe_ray.model.towers.fbank import fbank, frames_of
from unimoe_ray.model.towers.windows import split_windows

TINY = BeatsConfig(
    embed_dim=6,
    encoder_layers=2,
    encoder_embed_dim=8,
    encoder_ffn_embed_dim=10,
    encoder_attention_heads=2,
    conv_pos=4,
    conv_pos_groups=2,
    num_buckets=12,
    max_distance=20,
)
WINDOW = 400 + 160 * 40  # 41 frames: two time steps of 16 frames


@pytest.fixture
def network() -> Beats:
    torch.manual_seed(0)
    network = Beats(TINY)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return network.eval()


def sound(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


def test_fbank_against_one_frame_and_band_at_a_time():
    wave = torch.from_numpy(sound(900)).double()
    found = fbank(wave, 20)
    assert found.shape == (frames_of(900), 20) == (4, 20)
    edges = [1127 * math.log(1 + f / 700) for f in (20, 8000)]
    width = (edges[1] - edges[0]) / 21
    for frame in range(4):
        x = wave[160 * frame : 160 * frame + 400] * 32768
        x = x - x.mean()
        x = torch.stack([x[i] - 0.97 * x[max(i - 1, 0)] for i in range(400)])
        x = x * torch.tensor([(0.5 - 0.5 * math.cos(2 * math.pi * i / 399)) ** 0.85 for i in range(400)])
        turns = torch.arange(400)[:, None] * torch.arange(257) / 512
        spectrum = (x[:, None] * torch.polar(torch.ones(400, 257).double(), -2 * math.pi * turns.double())).sum(0)
        power = spectrum.real**2 + spectrum.imag**2
        for band in range(20):
            energy = 0.0
            for k in range(256):
                place = (1127 * math.log(1 + k * 31.25 / 700) - edges[0]) / width
                energy += max(0.0, 1 - abs(place - band - 1)) * power[k].item()
            assert found[frame, band].item() == pytest.approx(math.log(max(energy, 2**-23)), abs=1e-4)


def test_fbank_of_many_is_that_of_each_and_silence_is_the_floor():
    waves = torch.from_numpy(np.stack([sound(1000, 1), sound(1000, 2)]))
    torch.testing.assert_close(fbank(waves)[1], fbank(waves[1]))
    assert (fbank(torch.full((800,), 0.25)) == math.log(2**-23)).all()
    assert frames_of(399) == 0 and frames_of(400) == 1 and frames_of(480_000) == 2998


def test_buckets_against_one_pair_at_a_time():
    found = relative_buckets(40, 12, 20, torch.device("cpu"))
    for query in range(40):
        for key in range(40):
            distance = abs(key - query)
            near = 3 + int(math.log(max(distance, 1) / 3) / math.log(20 / 3) * 3)
            bucket = distance if distance < 3 else min(near, 5)
            assert found[query, key] == bucket + (6 if key > query else 0), (query, key)


def test_encoder_against_one_query_at_a_time(network):
    """DeepNorm, the gate of every query and the mask, spelled out."""
    torch.manual_seed(1)
    spectrogram = torch.randn(2, 41, 128)
    padding = torch.zeros(2, 41, dtype=torch.bool)
    padding[1, 20:] = True
    found = network(spectrogram, padding)
    masked = network.patch_padding(padding)
    assert not masked[0].any() and masked[1].any() and not masked[1].all()

    encoder = network.encoder
    x = network.embed(spectrogram)
    x[masked] = 0
    conv = encoder.pos_conv[0]
    weight = torch.stack(
        [conv.weight_g[0, 0, t] * conv.weight_v[..., t] / conv.weight_v[..., t].norm() for t in range(4)], -1
    )
    x = encoder.layer_norm(x + F.gelu(F.conv1d(x.mT, weight, conv.bias, padding=2, groups=2)[..., :16]).mT)
    buckets = relative_buckets(16, 12, 20, x.device)
    for layer in encoder.layers:
        attention = layer.self_attn
        context = torch.zeros_like(x)
        for row in range(2):
            for head in range(2):
                part = slice(4 * head, 4 * head + 4)
                q, k, v = (p(x[row])[:, part] for p in (attention.q_proj, attention.k_proj, attention.v_proj))
                for query in range(16):
                    gates = attention.grep_linear(q[query])
                    update, reset = gates[:4].sum().sigmoid(), gates[4:].sum().sigmoid()
                    gate = update * (reset * attention.grep_a[0, head, 0, 0] - 1) + 2
                    bias = gate * attention.relative_attention_bias.weight[buckets[query], head]
                    scores = (k @ q[query] / 2 + bias).masked_fill(masked[row], -torch.inf)
                    context[row, query, part] = scores.softmax(0) @ v
        x = layer.self_attn_layer_norm(4**0.25 * x + attention.out_proj(context))
        x = layer.final_layer_norm(4**0.25 * x + layer.fc2(F.gelu(layer.fc1(x))))
    torch.testing.assert_close(found, x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(network(spectrogram[1:], padding[1:])[0], found[1], atol=1e-5, rtol=1e-5)


def test_published_size_and_names():
    with torch.device("meta"):
        network = Beats(BeatsConfig())
    assert sum(p.numel() for p in network.parameters()) == 90_311_792
    names = network.state_dict().keys()
    assert {"encoder.pos_conv.0.weight_g", "encoder.layers.11.self_attn.relative_attention_bias.weight"} <= names


def test_a_checkpoint_loads_strictly(network):
    cfg = {**TINY.__dict__, "layer_norm_first": False, "dropout": 0.1}
    state = network.state_dict()
    loaded = load_beats({"cfg": cfg, "model": state})
    torch.testing.assert_close(loaded.state_dict(), state, atol=0, rtol=0)
    with pytest.raises(RuntimeError, match="grep_a"):
        load_beats({"cfg": cfg, "model": {k: v for k, v in state.items() if "1.self_attn.grep_a" not in k}})
    with pytest.raises(ValueError, match="layer_norm_first=True is not supported"):
        load_beats({"cfg": cfg | {"layer_norm_first": True}, "model": state})
    with pytest.raises(ValueError, match="activation_fn=glu is not supported, only gelu, relu"):
        load_beats({"cfg": cfg | {"activation_fn": "glu"}, "model": state})
    with pytest.raises(ValueError, match="holds cfg and model; this one holds weights"):
        load_beats({"weights": state})


def test_no_sample_is_lost_and_what_is_cut_is_said():
    wave = sound(25)
    for repeat, fill in ((True, wave[-1]), (False, 0.0)):
        windows = split_windows(wave, 10, 5, repeat_last=repeat)
        np.testing.assert_array_equal(windows.ravel(), np.r_[wave, np.full(5, fill, np.float32)])
    assert split_windows(wave[:20], 10, 2, repeat_last=True).shape == (2, 10)
    with pytest.warns(
        UserWarning, match=r"a sound of 2\.0 s has more than 3 windows of 0\.5 s: the last 0\.5 s were cut"
    ):
        windows = split_windows(sound(32_000), 8_000, 3, repeat_last=True)
    np.testing.assert_array_equal(windows.ravel(), sound(32_000)[:24_000])


def test_tower_contract(network):
    tower = BeatsTower(network, window=WINDOW, max_windows=3)
    assert isinstance(tower, Tower) and (tower.name, tower.modality, tower.feature_dim) == ("beats", "audio", 8)
    media = [sound(2 * WINDOW + 5, 1), sound(100, 2), sound(WINDOW, 3)]
    batch = [tower.preprocess(item) for item in media]
    assert [windows.shape for windows in batch] == [(3, 41, 129), (1, 41, 129), (1, 41, 129)]
    features = tower(batch)
    assert features.owner.tolist() == [0, 0, 0, 1, 2]
    tokens = [tower.tokens_for(item) for item in media]
    assert features.lengths.tolist() == [n for windows in tokens for n in windows] == [16] * 5
    for index, windows in enumerate(batch):
        alone = tower([windows]).values
        torch.testing.assert_close(features.values[features.owner == index], alone, atol=1e-5, rtol=1e-5)
    with pytest.raises(UnimoeError, match="no samples"):
        tower.preprocess(sound(0))


def test_padding_of_a_window_is_masked_not_heard(network):
    """The last sample's value fills it up; what is there makes no difference to the sound's own patches."""
    tower = BeatsTower(network, window=WINDOW)
    windows = tower.preprocess(sound(WINDOW // 2))
    assert windows[0, :, 128].tolist() == [float(WINDOW // 41 * i >= WINDOW // 2) for i in range(41)]
    kept = ~network.patch_padding(torch.from_numpy(windows[..., 128]) > 0)[0]
    other = windows.copy()
    other[0, 32:, :128] = 3.0
    assert kept.any() and not kept.all()
    torch.testing.assert_close(tower([other]).values[0, :4], tower([windows]).values[0, :4], atol=1e-5, rtol=1e-5)


def test_padding_is_reduced_with_all():
    padding = torch.tensor([[False, True, True, True, True, False, True]])
    assert reduce_padding(padding, 3).tolist() == [[False, True, False]]


def test_fingerprints_follow_settings(network):
    assert BeatsTower(network, WINDOW).fingerprint() != BeatsTower(network, WINDOW, max_windows=1).fingerprint()
