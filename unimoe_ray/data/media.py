"""Media files to arrays: Pillow, soundfile and PyAV, bounded in pixels and seconds."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import soundfile
from PIL import Image, ImageOps, UnidentifiedImageError

SAMPLE_RATE = 16_000
MAX_PIXELS = 64_000_000
MAX_SECONDS = 600.0
# Beyond these a header is damaged, and resampling would take gigabytes.
RATES = (1_000, 768_000)
_VIDEO_CONTAINERS = {".mp4", ".m4a", ".mov", ".mkv", ".webm", ".avi", ".mp3"}


class BadMedia(Exception):
    """A file that can't be read, with the reason in one line (file name included)."""


def load_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An RGB image, EXIF orientation applied. Raises BadMedia."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                if image.width * image.height > max_pixels:
                    raise BadMedia(f"{path}: {image.width} x {image.height} pixels; at most {max_pixels} are allowed")
                upright = ImageOps.exif_transpose(image)
                if upright.mode.startswith("I;16"):  # Pillow would clip these greys instead of scaling them.
                    upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
                return upright.convert("RGB")
    except UnidentifiedImageError:
        raise BadMedia(f"{path}: not an image that can be read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadMedia(f"{path}: {_reason(error)}") from None


def load_audio(path: str | Path, max_seconds: float = MAX_SECONDS) -> np.ndarray:
    """A mono waveform at 16 kHz, float32 [samples] in -1..1; the sound track of a video file. Raises BadMedia."""
    wave = (
        _decode_with_av(path, max_seconds)
        if Path(path).suffix.lower() in _VIDEO_CONTAINERS
        else _read(path, max_seconds)
    )
    if not len(wave):
        raise BadMedia(f"{path}: has no sound samples")
    if not np.isfinite(wave).all():
        raise BadMedia(f"{path}: has samples that are not finite")
    return wave


def load_video(
    path: str | Path, frames: int, max_pixels: int = MAX_PIXELS, max_seconds: float = MAX_SECONDS
) -> list[Image.Image]:
    """``frames`` RGB images, uniformly spread over the video's frames. Raises BadMedia."""
    kept: list[Image.Image] = []
    stride = 1
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BadMedia(f"{path}: has no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise BadMedia(f"{path}: has a video stream of an unknown codec")
            if stream.width * stream.height > max_pixels:
                raise BadMedia(f"{path}: {stream.width} x {stream.height} pixels; at most {max_pixels} are allowed")
            for index, frame in enumerate(container.decode(stream)):
                if frame.time is not None and frame.time > max_seconds:
                    raise BadMedia(f"{path}: longer than {max_seconds:g} s")
                if index % stride == 0:
                    kept.append(frame.to_image())
                # Bounded memory for long videos: past 16 times the frames wanted, drop every other one.
                if len(kept) >= 16 * frames:
                    kept, stride = kept[::2], stride * 2
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise BadMedia(f"{path}: {_reason(error)}") from None
    if not kept:
        raise BadMedia(f"{path}: has no video frames")
    return pick_frames(kept, frames)


def pick_frames(images: list[Image.Image], frames: int) -> list[Image.Image]:
    """First to last, evenly; repeated when there are fewer."""
    return [images[round(i)] for i in np.linspace(0, len(images) - 1, frames)]


def _read(path: str | Path, max_seconds: float) -> np.ndarray:
    try:
        with soundfile.SoundFile(str(path)) as file:
            if file.frames > max_seconds * file.samplerate:
                raise BadMedia(
                    f"{path}: {file.frames / file.samplerate:.0f} s long; at most {max_seconds:g} s are allowed"
                )
            rate = file.samplerate
            wave = file.read(dtype="float32", always_2d=True).mean(axis=1)
    except (soundfile.LibsndfileError, OSError) as error:
        raise BadMedia(f"{path}: {_reason(error)}") from None
    return wave if rate == SAMPLE_RATE else _resample(wave, rate, path)


def _resample(wave: np.ndarray, rate: int, path: str | Path) -> np.ndarray:
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave[None]), format="flt", layout="mono")
    frame.sample_rate = rate
    return _concatenate(iter([frame]), path)


def _decode_with_av(path: str | Path, max_seconds: float) -> np.ndarray:
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise BadMedia(f"{path}: has no sound track")
            return _concatenate(
                container.decode(container.streams.audio[0]), path, limit=int(max_seconds * SAMPLE_RATE)
            )
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise BadMedia(f"{path}: {_reason(error)}") from None


def _concatenate(frames: Iterator[av.AudioFrame], path: str | Path, limit: int | None = None) -> np.ndarray:
    resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
    parts, total = [], 0
    for frame in _then_none(frames):
        if frame is not None and not RATES[0] <= frame.sample_rate <= RATES[1]:
            raise BadMedia(f"{path}: sampled at {frame.sample_rate} Hz; {RATES[0]} to {RATES[1]} Hz are allowed")
        for piece in resampler.resample(frame):
            parts.append(piece.to_ndarray()[0])
            total += len(parts[-1])
        if limit is not None and total > limit:
            raise BadMedia(f"{path}: longer than {limit / SAMPLE_RATE:g} s")
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _then_none(frames: Iterator[av.AudioFrame]) -> Iterator[av.AudioFrame | None]:
    yield from frames
    yield None  # flushes the resampler


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
