"""Media files to arrays: Pillow, soundfile and PyAV, bounded in pixels and seconds."""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile
from PIL import Image, ImageOps, UnidentifiedImageError

from unimoe_ray.data.locations import BadMedia, MediaBytes, reason

SAMPLE_RATE = 16_000
MAX_PIXELS = 64_000_000
MAX_SECONDS = 600.0
# Beyond these a header is damaged, and resampling would take gigabytes.
RATES = (1_000, 768_000)
MAX_FRAMES = 40_000  # some 10 minutes at 60 a second; nearly empty frames cost few bytes, but time
PIECE = 16_384  # sound frames decoded at a time
# Integers that were written as floats pass; the power of much louder ones is no number any more.
LOUDEST = 2.0**32
# Formats that hold all their data: a playlist would make the decoder open what it names, an EPS file run a program.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mp3,ogg,flac,wav,aac"
_PICTURE_HEADS = (b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")
_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
# What damaged files make Pillow's parsers raise.
_BROKEN_IMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError),
    *(struct.error, zlib.error, Image.DecompressionBombError, RuntimeError),  # RuntimeError: AVIF
)

Source = str | Path | MediaBytes


def load_image(path: Source, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An RGB image, EXIF orientation applied. Raises BadMedia."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                _check_size(image, max_pixels, path)
                return _eight_bits(ImageOps.exif_transpose(image), path).convert("RGB")
    except UnidentifiedImageError:
        raise BadMedia(f"{_name(path)}: not an image that can be read") from None
    except _BROKEN_IMAGE as error:
        raise BadMedia(f"{_name(path)}: {reason(error)}") from None


def load_audio(path: Source, max_seconds: float = MAX_SECONDS) -> np.ndarray:
    """A mono waveform at 16 kHz, float32 [samples] in -1..1; the sound track of a video file. Raises BadMedia."""
    try:
        wave = _decode_with_av(path, max_seconds) if _is_container(path) else _read(path, max_seconds)
    except (av.error.FFmpegError, soundfile.LibsndfileError, OSError, ValueError) as error:
        raise BadMedia(f"{_name(path)}: {reason(error)}") from None
    if not len(wave):
        raise BadMedia(f"{_name(path)}: has no sound samples")
    if not np.isfinite(wave).all():
        raise BadMedia(f"{_name(path)}: has samples that are not finite")
    if max(wave.max(), -wave.min()) > LOUDEST:
        raise BadMedia(f"{_name(path)}: has samples far outside of -1 to 1")
    return wave


def load_video(
    path: Source, frames: int, max_pixels: int = MAX_PIXELS, max_seconds: float = MAX_SECONDS
) -> list[Image.Image]:
    """``frames`` RGB images: those nearest to moments spread evenly from the time of the first frame to that of the
    last one, turned as the file says. A picture is a video of one frame. Raises BadMedia."""
    try:
        head = _head(path)
        if head.startswith(_PICTURE_HEADS) or head[8:] == b"WEBP":
            return [load_image(path, max_pixels)] * frames
        moments, numbered = _moments(path, frames, max_pixels, max_seconds)
        with _open_container(path) as container:
            decoded = _timed(container.decode(video=0), numbered, max_pixels, path)
            picked = [_picture(frame) for frame in _nearest(decoded, moments)]
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise BadMedia(f"{_name(path)}: {reason(error)}") from None
    if not picked:
        raise BadMedia(f"{_name(path)}: has no video frames")
    return picked + picked[-1:] * (frames - len(picked))


def pick_frames(images: list[Image.Image], frames: int) -> list[Image.Image]:
    """First to last, evenly; repeated when there are fewer."""
    return [images[round(i)] for i in np.linspace(0, len(images) - 1, frames)]


def _moments(path: Source, frames: int, max_pixels: int, max_seconds: float) -> tuple[list[float], bool]:
    """The times at which pictures are wanted, in units of the stream, and whether frames are numbered instead of timed:
    from the packets, which are not decoded."""
    with _open_container(path) as container:
        if not container.streams.video:
            raise BadMedia(f"{_name(path)}: has no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise BadMedia(f"{_name(path)}: has a video stream of an unknown codec")
        _check_size(stream, max_pixels, path)
        times: list[int | None] = []
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                times.append(packet.pts)
            if len(times) > MAX_FRAMES:
                raise BadMedia(f"{_name(path)}: has more than {MAX_FRAMES} frames")
        # AVI has frames at a fixed rate, and knows only the order in which they are decoded.
        numbered = None in times or container.format.name == "avi"
        if numbered:
            times = list(range(len(times)))
        unit = 1 / (stream.average_rate or 1) if numbered else stream.time_base
        if times and (max(times) - min(times)) * unit > max_seconds:
            raise BadMedia(f"{_name(path)}: longer than {max_seconds:g} s")
        return np.linspace(min(times), max(times), frames).tolist() if times else [], numbered


def _timed(
    decoded: Iterator[av.VideoFrame], numbered: bool, max_pixels: int, path: Source
) -> Iterator[tuple[float, av.VideoFrame]]:
    time = -math.inf
    for number, frame in enumerate(decoded):
        if number >= MAX_FRAMES:
            raise BadMedia(f"{_name(path)}: has more than {MAX_FRAMES} frames")
        _check_size(frame, max_pixels, path)  # It may change on the way.
        time = number if numbered else time if frame.pts is None else max(time, frame.pts)
        yield time, frame


def _nearest(timed: Iterator[tuple[float, av.VideoFrame]], moments: list[float]) -> Iterator[av.VideoFrame]:
    """The frame nearest to each moment, holding two at a time; of two equally near ones that with the even number."""
    left = deque(moments)
    before = None
    for number, (time, frame) in enumerate(timed):
        while left and left[0] <= time:
            late, early = time - left[0], math.inf if before is None else left[0] - before[0]
            yield frame if late < early or (late == early and number % 2 == 0) else before[1]
            left.popleft()
        if not left:
            return
        before = time, frame
    if before is not None:  # Frames that the packets promised did not come.
        yield from (before[1] for _ in left)


def _picture(frame: av.VideoFrame) -> Image.Image:
    """As it is to be seen: phones film sideways and write by how much."""
    image = frame.to_image()
    turn = _TURNS.get(frame.rotation % 360)
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image, path: Source) -> Image.Image:
    """Greys of 16 bits scaled to 8, where Pillow would clip them."""
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image)
        if values.size and (values.min() < 0 or values.max() > 65_535):
            raise BadMedia(f"{_name(path)}: greys of more than 16 bits")
        return Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise BadMedia(f"{_name(path)}: greys as floating-point numbers, whose range is not known")
    return image


def _check_size(picture: Image.Image | av.VideoStream | av.VideoFrame, max_pixels: int, path: Source) -> None:
    if picture.width * picture.height > max_pixels:
        raise BadMedia(f"{_name(path)}: {picture.width} x {picture.height} pixels; at most {max_pixels} are allowed")


def _head(path: Source) -> bytes:
    """The first 12 bytes."""
    if isinstance(path, str | Path):
        with open(path, "rb") as file:
            return file.read(12)
    head = path.read(12)
    path.seek(0)
    return head


def _is_container(path: Source) -> bool:
    """Whether the first bytes are those of a format that PyAV reads and libsndfile does not (or reads worse: MP3)."""
    head = _head(path)
    is_mp3 = head[:3] == b"ID3" or (head[:1] == b"\xff" and head[1:2] >= b"\xe0")
    return head[4:8] == b"ftyp" or head[:4] == b"\x1aE\xdf\xa3" or head[8:12] == b"AVI " or is_mp3


def _open_container(path: Source) -> av.container.InputContainer:
    if isinstance(path, MediaBytes):
        path.seek(0)
    return av.open(str(path) if isinstance(path, Path) else path, options={"format_whitelist": CONTAINERS})


def _name(path: Source) -> str:
    return str(path) if isinstance(path, str | Path) else str(getattr(path, "name", "the file"))


def _read(path: Source, max_seconds: float) -> np.ndarray:
    with soundfile.SoundFile(path) as file:
        if file.frames > max_seconds * file.samplerate:
            raise BadMedia(
                f"{_name(path)}: {file.frames / file.samplerate:.0f} s long; at most {max_seconds:g} s are allowed"
            )
        # Piece by piece: a file of some kilobytes may hold minutes of silence in hundreds of channels.
        pieces = (piece.mean(axis=1) for piece in file.blocks(PIECE, dtype="float32", always_2d=True) if len(piece))
        if file.samplerate == SAMPLE_RATE:
            return np.concatenate([np.zeros(0, np.float32), *pieces])
        return _concatenate((_frame(piece, file.samplerate) for piece in pieces), path)


def _frame(wave: np.ndarray, rate: int) -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave[None]), format="flt", layout="mono")
    frame.sample_rate = rate
    return frame


def _decode_with_av(path: Source, max_seconds: float) -> np.ndarray:
    with _open_container(path) as container:
        if not container.streams.audio:
            raise BadMedia(f"{_name(path)}: has no sound track")
        return _concatenate(_mixed(container.decode(audio=0)), path, limit=int(max_seconds * SAMPLE_RATE))


def _mixed(frames: Iterator[av.AudioFrame]) -> Iterator[av.AudioFrame]:
    """The mean of the channels, as for all other files: the resampler's own mix of two is 3 dB louder."""
    planar = av.AudioResampler(format="fltp")
    for frame in _then_none(frames):
        for piece in planar.resample(frame):
            yield _frame(piece.to_ndarray().mean(axis=0), piece.sample_rate)


def _concatenate(frames: Iterator[av.AudioFrame], path: Source, limit: int | None = None) -> np.ndarray:
    """Mono frames to one wave at 16 kHz: ceil(seconds * 16,000) samples of what the frames hold in seconds."""
    resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
    parts, total, seconds = [], 0, Fraction(0)
    for frame in _then_none(frames):
        if frame is not None:
            if not RATES[0] <= frame.sample_rate <= RATES[1]:
                raise BadMedia(
                    f"{_name(path)}: sampled at {frame.sample_rate} Hz; {RATES[0]} to {RATES[1]} Hz are allowed"
                )
            seconds += Fraction(frame.samples, frame.sample_rate)
        for piece in resampler.resample(frame):
            parts.append(piece.to_ndarray()[0])
            total += len(parts[-1])
        if limit is not None and total > limit:
            raise BadMedia(f"{_name(path)}: longer than {limit / SAMPLE_RATE:g} s")
    length = math.ceil(seconds * SAMPLE_RATE)
    # The resampler gives a sample more or less, depending on the rate.
    return np.concatenate([*parts, np.zeros(max(0, length - total), np.float32)])[:length]


def _then_none(frames: Iterator[av.AudioFrame]) -> Iterator[av.AudioFrame | None]:
    yield from frames
    yield None  # flushes the resampler
