"""Media files of sample answers, copied beside the report in a form that browsers show."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
from PIL import Image, UnidentifiedImageError

BROWSER_VIDEO = {"h264", "vp8", "vp9", "av1"}
BROWSER_IMAGES = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".avif"}
BROWSER_AUDIO = {"aac", "mp3"}  # what an MP4 file may carry on unchanged


@dataclass(frozen=True)
class Shown:
    """``kind`` image, audio or video; ``name`` of the file in the media folder; pixel size of images and videos.

    ``poster`` is the name of a picture of a video's first frame.
    """

    kind: str
    name: str
    size: tuple[int, int] | None = None
    poster: str | None = None


def bring(kind: str, source: Path, folder: Path) -> Shown | None:
    """Copy or convert one file into ``folder``, named by its content. None if it is missing or unreadable."""
    if not source.is_file():
        return None
    with open(source, "rb") as file:
        name = hashlib.file_digest(file, "sha256").hexdigest()[:20]
    if kind == "image" or (kind == "video" and source.suffix.lower() in BROWSER_IMAGES):
        return _image(source, folder, name)
    if kind == "video":
        return _video(source, folder, name)
    return _audio(source, folder, name)


def _image(source: Path, folder: Path, name: str) -> Shown | None:
    suffix = source.suffix.lower()
    try:
        with Image.open(source) as image:
            size = image.size
            if suffix in BROWSER_IMAGES:
                return Shown("image", _copy(source, folder / (name + suffix)), size)
            target = folder / f"{name}.png"
            if not target.exists():
                image.convert("RGB").save(target)
            return Shown("image", target.name, size)
    except (UnidentifiedImageError, Image.DecompressionBombError, ValueError):
        return None


def _audio(source: Path, folder: Path, name: str) -> Shown:
    suffix = source.suffix.lower()
    # The sound track of a video file plays in an audio element only if the container's name says so.
    return Shown("audio", _copy(source, folder / (name + (".m4a" if suffix == ".mp4" else suffix))))


def _video(source: Path, folder: Path, name: str) -> Shown | None:
    poster = folder / f"{name}-first.png"
    try:
        with av.open(str(source)) as container:
            first = next(container.decode(video=0), None)
            if first is None:
                return None
            codec, size = container.streams.video[0].codec_context.name, (first.width, first.height)
            first.to_image().save(poster)
        if codec in BROWSER_VIDEO:
            return Shown("video", _copy(source, folder / (name + source.suffix.lower())), size, poster.name)
        target = folder / f"{name}.mp4"
        if not target.exists():
            _to_h264(source, target)
        return Shown("video", target.name, size, poster.name)
    except (av.FFmpegError, ValueError, IndexError):
        return None


def _to_h264(source: Path, target: Path) -> None:
    """No browser plays MPEG-4 part 2 in MP4, all play H.264. The sound track is kept if it is AAC or MP3."""
    temporary = target.with_suffix(".part")
    try:
        with av.open(str(source)) as given, av.open(str(temporary), "w", format="mp4") as made:
            video = given.streams.video[0]
            out = made.add_stream("libx264", rate=video.average_rate or Fraction(25))
            out.width, out.height = (max(2, side // 2 * 2) for side in (video.width, video.height))
            out.pix_fmt = "yuv420p"
            out.options = {"crf": "16", "preset": "veryfast", "bf": "0"}
            sound = next((s for s in given.streams.audio if s.codec_context.name in BROWSER_AUDIO), None)
            sound_out = made.add_stream_from_template(sound) if sound is not None else None
            for packet in given.demux([s for s in (video, sound) if s is not None]):
                if packet.stream is video:
                    for frame in packet.decode():
                        made.mux(out.encode(frame.reformat(out.width, out.height, "yuv420p")))
                elif packet.dts is not None:
                    packet.stream = sound_out
                    made.mux(packet)
            made.mux(out.encode(None))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> str:
    if not target.exists():
        shutil.copyfile(source, target)
    return target.name
