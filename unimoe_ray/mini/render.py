"""Pictures and moving pictures: Fashion-MNIST to PNG, a shape cut out of a picture and moved, MP4 files."""

from __future__ import annotations

import gzip
import random
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from unimoe_ray.errors import UnimoeError
from unimoe_ray.mini.waveform import SAMPLE_RATE

SIDE = 64
SPRITE = 28
FRAMES = 8
FRAMES_PER_SECOND = 4
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# Whole AAC frames of 1024 samples, the last count within the 2 s of the picture.
SOUNDTRACK_SAMPLES = FRAMES * SAMPLE_RATE // FRAMES_PER_SECOND // 1024 * 1024

_MAX_IDX_BYTES = 256 << 20


def read_idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of bytes (the MNIST format) as uint8 [n, ...]. Raises UnimoeError when it is not one."""
    try:
        with gzip.open(path) as file:
            data = file.read(_MAX_IDX_BYTES)
        zeros, kind, dimensions = struct.unpack_from(">HBB", data)
        shape = struct.unpack_from(f">{dimensions}I", data, 4)
        if (zeros, kind) != (0, 8):
            raise ValueError("unknown header")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (EOFError, OSError, ValueError, struct.error, zlib.error) as error:
        raise UnimoeError(f"{path}: not a gzipped IDX file of bytes ({error})") from None


def write_grey(path: Path, grey: np.ndarray) -> None:
    """uint8 [h, w] as a 64x64 RGB PNG, enlarged bicubically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB").save(path, compress_level=1)


def cut_out(path: Path) -> tuple[Image.Image, tuple[int, int, int]]:
    """The one object of a picture on a plain ground, longer side 28 px, on that ground, and the ground's colour."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    colours, counts = np.unique(pixels.astype(int) @ (65536, 256, 1), return_counts=True)
    most = int(colours[counts.argmax()])
    ground = (most >> 16, most >> 8 & 255, most & 255)
    differs = np.abs(pixels.astype(int) - ground).max(axis=2) > 8
    if not differs.any():
        raise UnimoeError(f"{path}: one plain colour, nothing to cut out")
    rows, columns = np.flatnonzero(differs.any(axis=1)), np.flatnonzero(differs.any(axis=0))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    width, height = box[2] - box[0], box[3] - box[1]
    scale = SPRITE / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    sprite = Image.fromarray(pixels).crop(tuple(map(int, box))).resize(size, Image.Resampling.BICUBIC)
    return sprite, ground


def move(sprite: Image.Image, ground: tuple[int, int, int], direction: str, rng: random.Random) -> list[Image.Image]:
    """8 frames of 64x64: the sprite crosses the picture; lane, start and speed (22 px or more) are random."""
    rooms = (SIDE - sprite.width, SIDE - sprite.height)
    axis = 0 if direction in ("left", "right") else 1
    travel = rng.uniform(22, rooms[axis])
    start = rng.uniform(0, rooms[axis] - travel)
    lane = rng.uniform(0, rooms[1 - axis])
    frames = []
    for number in range(FRAMES):
        along = start + travel * number / (FRAMES - 1)
        if direction in ("left", "up"):
            along = rooms[axis] - along
        position = (along, lane) if axis == 0 else (lane, along)
        frame = Image.new("RGB", (SIDE, SIDE), ground)
        frame.paste(sprite, (round(position[0]), round(position[1])))
        frames.append(frame)
    return frames


def write_mp4(path: Path, frames: list[Image.Image], sound: np.ndarray | None = None) -> None:
    """MPEG-4 video at 4 frames a second, and an AAC track of ``sound`` (float32 [samples] at 16 kHz) if given.

    The same input gives the same bytes: one thread, no encoder names or dates in the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        video = container.add_stream("mpeg4", rate=FRAMES_PER_SECOND)
        video.width, video.height, video.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
        # Constant quantiser 2, the finest that the format has.
        video.codec_context.options = {"flags": "+bitexact", "qmin": "2", "qmax": "2"}
        video.codec_context.thread_count = 1
        audio = None
        if sound is not None:
            audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
            audio.bit_rate = 64_000
            audio.codec_context.options = {"flags": "+bitexact", "aac_coder": "fast"}
            audio.codec_context.thread_count = 1
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = number, Fraction(1, FRAMES_PER_SECOND)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None:
            for start in range(0, len(sound), 1024):
                part = np.ascontiguousarray(sound[None, start : start + 1024], np.float32)
                frame = av.AudioFrame.from_ndarray(part, "fltp", "mono")
                frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, start, Fraction(1, SAMPLE_RATE)
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
