"""Long sounds as consecutive windows of one length (Uni-MoE, section 3.1: 30 s each, at most 10 minutes)."""

from __future__ import annotations

import warnings

import numpy as np

from unimoe_ray.errors import UnimoeError
from unimoe_ray.model.towers import SAMPLE_RATE

WINDOW_SECONDS = 30
MAX_WINDOWS = 20


def count_windows(samples: int, window: int, max_windows: int) -> int:
    """Windows of ``window`` samples that a sound fills, at most ``max_windows``. Raises UnimoeError when empty."""
    if samples == 0:
        raise UnimoeError("the sound has no samples")
    return min(-(-samples // window), max_windows)


def split_windows(waveform: np.ndarray, window: int, max_windows: int, *, repeat_last: bool) -> np.ndarray:
    """[samples] to [W, window] float32: no overlap, no sample lost, the last window filled up with silence or with the
    last sample's value (``repeat_last``). What is beyond ``max_windows`` is cut, with a warning that says how much."""
    waveform = np.asarray(waveform, dtype=np.float32)
    windows = count_windows(len(waveform), window, max_windows)
    total = windows * window
    if len(waveform) > total:
        warnings.warn(
            f"a sound of {len(waveform) / SAMPLE_RATE:.1f} s has more than {max_windows} windows of "
            f"{window / SAMPLE_RATE:g} s: the last {(len(waveform) - total) / SAMPLE_RATE:.1f} s were cut",
            stacklevel=3,
        )
    missing = max(0, total - len(waveform))
    filled = np.pad(waveform[:total], (0, missing), mode="edge" if repeat_last else "constant")
    return filled.reshape(windows, window)
