"""Small operations on waveforms: float32 [samples], mono, -1..1."""

from __future__ import annotations

import wave as wave_file
from pathlib import Path

import numpy as np
import soundfile

SAMPLE_RATE = 16_000


def resample(wave: np.ndarray, rate: int) -> np.ndarray:
    """From ``rate`` Hz to 16 kHz, band-limited (by cutting the spectrum). float32."""
    if rate == SAMPLE_RATE:
        return wave.astype(np.float32)
    # With the length a multiple of ``block`` both lengths are whole numbers of samples.
    block = rate // np.gcd(rate, SAMPLE_RATE)
    size = -(-len(wave) // block) * block
    new_size = size // block * (SAMPLE_RATE // np.gcd(rate, SAMPLE_RATE))
    spectrum = np.fft.rfft(wave, size)
    return (np.fft.irfft(spectrum[: new_size // 2 + 1], new_size) * (new_size / size)).astype(np.float32)


def trim(wave: np.ndarray, threshold: float = 0.02, margin: float = 0.05) -> np.ndarray:
    """Without the silence before and after, but for ``margin`` seconds. ``threshold``: share of the peak."""
    loud = np.flatnonzero(np.abs(wave) > threshold * np.abs(wave).max(initial=0.0))
    if not len(loud):
        return wave
    keep = int(margin * SAMPLE_RATE)
    return wave[max(0, loud[0] - keep) : loud[-1] + keep]


def scale_peak(wave: np.ndarray, peak: float) -> np.ndarray:
    """The same wave with ``peak`` as its largest absolute value."""
    return wave * np.float32(peak / max(1e-6, float(np.abs(wave).max(initial=0.0))))


def write_wav(path: Path, wave: np.ndarray) -> None:
    """16 kHz, mono, 16-bit PCM."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave_file.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(np.round(np.clip(wave, -1.0, 1.0) * 32767).astype("<i2").tobytes())


def read_mono(path: Path) -> np.ndarray:
    """Any file that libsndfile reads, as 16 kHz mono float32."""
    wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return resample(wave.mean(axis=1), rate)
