"""The encoder of Whisper (Hugging Face's class) as a speech tower: on windows of 30 s, as it was trained and as Uni-MoE
uses it, or on the clip's own length, which is cheaper for short clips."""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from transformers import WhisperConfig
from transformers.audio_utils import mel_filter_bank
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from unimoe_ray.errors import UnimoeError
from unimoe_ray.model.towers import SAMPLE_RATE, FrozenTower
from unimoe_ray.model.towers.windows import MAX_WINDOWS, count_windows, split_windows

FFT, STEP = 400, 160  # samples: 25 ms every 10 ms
MAX_FRAMES = 3000  # 30 s
FRAMES_PER_POSITION = 2


def tiny_encoder() -> WhisperEncoder:
    """The architecture of Whisper tiny.en's encoder (8.2 M parameters), with random weights."""
    config = WhisperConfig(
        num_mel_bins=80,
        d_model=384,
        encoder_layers=4,
        encoder_attention_heads=6,
        encoder_ffn_dim=1536,
        max_source_positions=MAX_FRAMES // FRAMES_PER_POSITION,
        attn_implementation="sdpa",
    )
    return WhisperEncoder(config)


class WhisperFullTower(FrozenTower):
    """Speech. A window is 30 s, the last one filled up with silence; its tokens are all of the encoder's positions, one
    each 20 ms (1500 x 768 for small). ``max_windows`` (10 minutes) caps a file, with a warning."""

    name = "whisper"
    modality = "speech"
    chunk_elements = 8 * 80 * MAX_FRAMES

    def __init__(self, encoder: WhisperEncoder, max_windows: int = MAX_WINDOWS):
        super().__init__(encoder, {"length": "full", "max_windows": max_windows})
        self.window = encoder.config.max_source_positions * FRAMES_PER_POSITION * STEP
        self.max_windows = max_windows
        self.feature_dim = encoder.config.d_model

    def preprocess(self, media: np.ndarray) -> np.ndarray:
        """A waveform [samples] at 16 kHz to log-mel windows [W, mel bins, 3000] float32. Raises UnimoeError when
        empty."""
        windows = split_windows(media, self.window, self.max_windows, repeat_last=False)
        return log_mel(torch.from_numpy(windows), self.network.config.num_mel_bins).numpy()

    def tokens_for(self, media: np.ndarray) -> list[int]:
        """Tokens of each window."""
        windows = count_windows(len(media), self.window, self.max_windows)
        return [self.network.config.max_source_positions] * windows

    def encode(self, windows: torch.Tensor) -> torch.Tensor:
        """[B, mel bins, 3000] to [B, 1500, D]."""
        return self.network(windows).last_hidden_state


class WhisperTower(FrozenTower):
    """Speech. A window is a stretch of at most 30 s; longer sounds are cut into equal stretches. The encoder's
    positions (20 ms) are averaged ``pool`` at a time: a token each 80 ms, x 384 for tiny."""

    name = "whisper_tiny_en"
    modality = "speech"
    chunk_elements = 32 * 80 * 128

    def __init__(self, encoder: WhisperEncoder, pool: int = 4):
        super().__init__(encoder, {"pool": pool, "length": "own"})
        self.pool = pool
        self.mel_bins = encoder.config.num_mel_bins
        self.feature_dim = encoder.config.d_model

    def preprocess(self, media: np.ndarray) -> np.ndarray:
        """A waveform [samples] at 16 kHz to log-mel windows [W, mel bins, frames] float32, ``frames`` a multiple of
        2 ``pool``; silence fills up the last one. Raises UnimoeError when empty."""
        tokens = self.tokens_for(media)
        samples = tokens[0] * self.pool * FRAMES_PER_POSITION * STEP
        waveform = np.pad(np.asarray(media, dtype=np.float32), (0, samples * len(tokens) - len(media)))
        return log_mel(torch.from_numpy(waveform).view(len(tokens), samples), self.mel_bins).numpy()

    def tokens_for(self, media: np.ndarray) -> list[int]:
        """Tokens of each window."""
        if len(media) == 0:
            raise UnimoeError("the sound has no samples")
        per_token = self.pool * FRAMES_PER_POSITION * STEP
        longest = MAX_FRAMES * STEP // per_token
        total = -(-len(media) // per_token)
        windows = -(-total // longest)
        return [-(-total // windows)] * windows

    def encode(self, windows: torch.Tensor) -> torch.Tensor:
        """[B, mel bins, frames] to [B, frames / (2 pool), D]."""
        hidden = encode_positions(self.network, windows)
        return hidden.unflatten(1, (-1, self.pool)).mean(2)


def encode_positions(encoder: WhisperEncoder, mel: torch.Tensor) -> torch.Tensor:
    """``WhisperEncoder.forward`` for any even number of frames up to 3,000: the position embeddings are cut to the
    clip's length, which the class itself refuses. [B, mel bins, frames] to [B, frames / 2, D]."""
    hidden = F.gelu(encoder.conv1(mel))
    hidden = F.gelu(encoder.conv2(hidden)).transpose(1, 2)
    hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]]
    for layer in encoder.layers:
        hidden = layer(hidden, None)
    return encoder.layer_norm(hidden)


def log_mel(waveforms: torch.Tensor, mel_bins: int) -> torch.Tensor:
    """Whisper's input, as WhisperFeatureExtractor computes it: [B, samples] at 16 kHz to [B, mel bins, samples / 160],
    each clip's loudest 8 decades of power, scaled to about -1 to 1."""
    window = torch.hann_window(FFT, device=waveforms.device)
    spectrum = torch.stft(waveforms, FFT, STEP, window=window, return_complex=True)[..., :-1]
    power = (spectrum.real.square() + spectrum.imag.square()).contiguous()
    mel = _mel_filters(mel_bins).to(waveforms.device).T @ power
    decades = mel.clamp(min=1e-10).log10()
    decades = torch.maximum(decades, decades.amax((1, 2), keepdim=True) - 8.0)
    return (decades + 4.0) / 4.0


@functools.cache
def _mel_filters(mel_bins: int) -> torch.Tensor:
    filters = mel_filter_bank(1 + FFT // 2, mel_bins, 0.0, 8000.0, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters).float()
