"""Log-mel filter banks as Kaldi computes them (``compute-fbank-feats`` without dither), batched, in torch only.

BEATs asks for 128 bands with a 512-point transform, so that one mel triangle lies between two frequencies and holds
none of them: its band is the log of the floor in every frame. Kaldi's own library refuses such a configuration; BEATs
was trained on it.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

SAMPLE_RATE = 16_000
FRAME, STEP, FFT = 400, 160, 512  # samples: 25 ms every 10 ms
LOWEST_HZ, HIGHEST_HZ = 20.0, 8000.0
PREEMPHASIS = 0.97
FLOOR = torch.finfo(torch.float32).eps
FULL_SCALE = 2.0**15  # Kaldi takes 16-bit samples


def frames_of(samples: int) -> int:
    """Frames in so many samples; only whole ones count."""
    return 1 + (samples - FRAME) // STEP if samples >= FRAME else 0


def fbank(waveforms: torch.Tensor, bands: int = 128) -> torch.Tensor:
    """[..., samples] at 16 kHz within -1 to 1 to natural log energies [..., frames, bands], frames as ``frames_of``."""
    frames = (waveforms * FULL_SCALE).unfold(-1, FRAME, STEP)
    frames = frames - frames.mean(dim=-1, keepdim=True)
    before = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
    frames = (frames - PREEMPHASIS * before) * _povey_window().to(frames)
    power = torch.fft.rfft(frames, FFT).abs().square()
    return (power @ _mel_filters(bands).to(power)).clamp(min=FLOOR).log()


@functools.cache
def _povey_window() -> torch.Tensor:
    """Kaldi's default: a symmetric Hann window to the power of 0.85."""
    return torch.hann_window(FRAME, periodic=False).pow(0.85)


@functools.cache
def _mel_filters(bands: int) -> torch.Tensor:
    """Triangles [257, bands] that are linear in mel = 1127 ln(1 + Hz / 700), peaks of 1; Nyquist counts nowhere.

    In single precision on purpose: a band that catches a frequency with the foot of its triangle only has the rounding
    of the published front end in it.
    """
    lowest, highest = (1127.0 * math.log(1.0 + hertz / 700.0) for hertz in (LOWEST_HZ, HIGHEST_HZ))
    width = (highest - lowest) / (bands + 1)
    band = torch.arange(bands, dtype=torch.float32)
    low, centre, high = (lowest + (band + step) * width for step in range(3))
    hertz = torch.arange(FFT // 2, dtype=torch.float32) * (SAMPLE_RATE / FFT)
    frequency = (1127.0 * (1.0 + hertz / 700.0).log())[:, None]
    triangles = torch.minimum((frequency - low) / (centre - low), (high - frequency) / (high - centre)).clamp(min=0)
    return F.pad(triangles, (0, 0, 0, 1))
