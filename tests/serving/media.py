"""Real media files for requests, made from a seed."""

from __future__ import annotations

import base64
import io

import av
import numpy as np
import soundfile
from PIL import Image


def png(seed: int = 0, size: int = 64) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def wav(seed: int = 0, seconds: float = 1.0) -> bytes:
    noise = np.random.default_rng(seed).normal(0, 0.1, int(16_000 * seconds))
    buffer = io.BytesIO()
    soundfile.write(buffer, noise, 16_000, format="WAV")
    return buffer.getvalue()


def mp4(seed: int = 0, frames: int = 8) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        rng = np.random.default_rng(seed)
        for _ in range(frames):
            noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def data_url(data: bytes, mime: str = "application/octet-stream") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def image(data: bytes) -> dict:
    return {"type": "image_url", "image_url": {"url": data_url(data, "image/png")}}


def video(data: bytes) -> dict:
    return {"type": "video_url", "video_url": {"url": data_url(data, "video/mp4")}}


def sound(data: bytes, kind: str | None = "sound") -> dict:
    part = {"url": data_url(data, "audio/wav")}
    return {"type": "audio_url", "audio_url": part | ({"kind": kind} if kind else {})}


def input_audio(data: bytes, kind: str | None = None) -> dict:
    part = {"data": base64.b64encode(data).decode(), "format": "wav"}
    return {"type": "input_audio", "input_audio": part | ({"kind": kind} if kind else {})}
