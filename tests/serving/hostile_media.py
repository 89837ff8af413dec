"""Media files that claim what they are not, made byte by byte."""

from __future__ import annotations

import io
import struct
import zlib

import av
import numpy as np
import soundfile
from PIL import Image

from tests.serving.media import png


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_that_claims(width: int, height: int) -> bytes:
    """Black and white; two rows of it are there."""
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(2 * (width // 8 + 2)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def gif_that_claims(side: int) -> bytes:
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x02\x4c\x01\x00\x3b"
    return b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + bytes(6) + frame


def tiff_that_claims(side: int) -> bytes:
    tags = {256: side, 257: side, 258: 8, 259: 1, 262: 1, 273: 200, 277: 1, 278: side, 279: 10**9}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(200)


def wav_of(data: bytes = bytes(3200), *, rate: int = 16_000, channels: int = 1, bits: int = 16, code: int = 1) -> bytes:
    """Any header before the samples."""
    block = max(1, channels * bits // 8) % 2**16
    head = struct.pack("<IHHIIHH", 16, code, channels, rate, rate * block % 2**32, block, bits)
    return (
        b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + head + b"data" + struct.pack("<I", len(data)) + data
    )


def written(samples: np.ndarray, rate: int = 16_000, **options) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, **({"format": "WAV"} | options))
    return buffer.getvalue()


def picture_as(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png())).save(buffer, kind)
    return buffer.getvalue()


def encoded(container: str, codec: str, frames: list[av.VideoFrame | av.AudioFrame], **stream_settings) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, **stream_settings)
        for frame in frames:
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


def sound_as(container: str, codec: str) -> bytes:
    noise = np.random.default_rng(0).normal(0, 0.1, (1, 16_000)).astype(np.float32)
    frame = av.AudioFrame.from_ndarray(noise, format="fltp", layout="mono")
    frame.sample_rate = 16_000
    return encoded(container, codec, [frame], rate=16_000, layout="mono")


def video_of(width: int, height: int) -> bytes:
    frame = av.VideoFrame.from_ndarray(np.zeros((height, width, 3), np.uint8), format="rgb24")
    return encoded("mp4", "mpeg4", [frame], rate=8, width=width, height=height, pix_fmt="yuv420p")


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def many_channels() -> bytes:
    """100 kB that are 400 MB once decoded."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", 655_350, 8, "PCM_16", format="FLAC") as file:
        for _ in range(200):
            file.write(np.zeros((65_535, 8), np.float32))
    return buffer.getvalue()


M3U8 = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n"
PLAYLISTS = {
    "m3u8 of a file": M3U8.format("file:///etc/passwd").encode(),
    "m3u8 of an address": M3U8.format("http://127.0.0.1/").encode(),
    "m3u8 that begins as an MP3": b"ID3\x03" + bytes(6) + M3U8.format("http://127.0.0.1/a.ts").encode(),
    "ffconcat": b"ffconcat version 1.0\nfile 'file:///etc/passwd'\n",
    "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\nm=video 1234 RTP/AVP 96\n",
    "dash": b"<MPD><Period><AdaptationSet><BaseURL>file:///etc/passwd</BaseURL></AdaptationSet></Period></MPD>",
}
