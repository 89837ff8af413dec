"""YAMNet (AudioSet, 521 classes, 3.7 M parameters) as a tower for sounds.

Front end and architecture as in TensorFlow's models repository, research/audioset/yamnet: log-mel patches of 0.96 s
through MobileNetV1. Batch norms are already folded into the weights of the export that we read.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from unimoe_ray.errors import UnimoeError
from unimoe_ray.model.towers import SAMPLE_RATE, FrozenTower

# Of the 13 depthwise-separable layers: stride, output channels.
LAYERS = ((1, 64), (2, 128), (1, 128), (2, 256), (1, 256), (2, 512), *[(1, 512)] * 5, (2, 1024), (1, 1024))
CLASSES = 521
FEATURE_DIM = 1024

WINDOW, STEP, FFT = 400, 160, 512  # samples: 25 ms every 10 ms
BANDS, LOWEST_HZ, HIGHEST_HZ, LOG_OFFSET = 64, 125.0, 7500.0, 1e-3
PATCH, HOP = 96, 48  # frames: 0.96 s every 0.48 s
TOKENS_PER_PATCH = 3


class Yamnet(nn.Module):
    """Log-mel patches [B, 1, 96, 64] to class logits [B, 521]."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(1, 32, 3, 2)]
        channels = 32
        for stride, outputs in LAYERS:
            convolutions.append(
                nn.Conv2d(channels, channels, 3, stride, padding=1 if stride == 1 else 0, groups=channels)
            )
            convolutions.append(nn.Conv2d(channels, outputs, 1))
            channels = outputs
        self.convolutions = nn.ModuleList(convolutions)
        self.classifier = nn.Linear(FEATURE_DIM, CLASSES)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Feature maps [B, 1024, time 3, frequency 2]."""
        for convolution in self.convolutions:
            if convolution.stride[0] == 2:
                # TensorFlow's "same" padding of an even size.
                x = F.pad(x, (0, 1, 0, 1))
            x = F.relu(convolution(x), inplace=True)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class YamnetTower(FrozenTower):
    """Sounds. A window is a patch of 0.96 s, one every 0.48 s; its tokens are 3 steps in time, averaged over frequency
    (1.5 s of sound: 2 patches, 6 tokens x 1024)."""

    name = "yamnet"
    modality = "audio"
    feature_dim = FEATURE_DIM
    chunk_elements = 32 * PATCH * BANDS

    def __init__(self, network: Yamnet):
        network.to(memory_format=torch.channels_last)
        super().__init__(network, {"patch": PATCH, "hop": HOP, "pooling": "frequency"})

    def preprocess(self, media: np.ndarray) -> np.ndarray:
        """A waveform [samples] at 16 kHz to log-mel patches [W, 1, 96, 64] float32. Raises UnimoeError when empty."""
        patches = len(self.tokens_for(media))
        needed = ((patches - 1) * HOP + PATCH - 1) * STEP + WINDOW
        waveform = np.pad(np.asarray(media, dtype=np.float32)[:needed], (0, max(0, needed - len(media))))
        frames = torch.from_numpy(waveform).unfold(0, WINDOW, STEP) * torch.hann_window(WINDOW)
        mel = torch.log(torch.fft.rfft(frames, FFT).abs() @ _mel_weights() + LOG_OFFSET)
        return mel.unfold(0, PATCH, HOP).transpose(1, 2)[:, None].contiguous().numpy()

    def tokens_for(self, media: np.ndarray) -> list[int]:
        """Tokens of each patch. The last patch is there when at least half a hop of it would be new sound."""
        if len(media) == 0:
            raise UnimoeError("the sound has no samples")
        frames = 1 + (len(media) - WINDOW) / STEP
        return [TOKENS_PER_PATCH] * (1 + max(0, int((frames - PATCH) / HOP + 0.5)))

    def encode(self, windows: torch.Tensor) -> torch.Tensor:
        """[B, 1, 96, 64] to [B, 3, 1024]."""
        return self.network.features(windows).mean(3).transpose(1, 2)


@functools.cache
def _mel_weights() -> torch.Tensor:
    """Triangular filters [257, 64] on the mel scale of HTK, peaks of 1."""

    def mel(hertz):
        return 1127.0 * np.log1p(np.asarray(hertz) / 700.0)

    bins = mel(np.linspace(0.0, SAMPLE_RATE / 2, FFT // 2 + 1))[:, None]
    edges = np.linspace(mel(LOWEST_HZ), mel(HIGHEST_HZ), BANDS + 2)
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    weights = np.maximum(0, np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)))
    return torch.from_numpy(weights).float()
