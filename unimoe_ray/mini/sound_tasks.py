"""Sounds and moving pictures: sound_event, video_direction, video_object, video_sound and their captions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unimoe_ray.mini.example import SPLITS, Count, Example, Split, draw, stream
from unimoe_ray.mini.questions import Picture
from unimoe_ray.mini.render import DIRECTIONS, SOUNDTRACK_SAMPLES, cut_out, move, write_mp4
from unimoe_ray.mini.soundfont import SoundFont
from unimoe_ray.mini.waveform import SAMPLE_RATE, scale_peak, write_wav

SOUND_SECONDS = 1.5

# General MIDI programs.
EVENTS = {
    "piano": 0,
    "organ": 19,
    "guitar": 24,
    "violin": 40,
    "trumpet": 56,
    "flute": 73,
    "seashore": 122,
    "bird": 123,
    "telephone": 124,
    "helicopter": 125,
    "applause": 126,
    "gunshot": 127,
}
# Sounds of one short beat, repeated after so many seconds.
_REPEATED = {"bird": 0.4, "telephone": 0.25}


def sound_examples(out: Path, font: SoundFont, seed: int, sizes: Count, captions_dev: int) -> Split:
    """sound_event, and for train and some of dev caption_sound, on WAV files of 1.5 s."""
    result: Split = {split: [] for split in SPLITS}
    for split, count in zip(SPLITS, sizes, strict=True):
        captions = {"train": count, "dev": captions_dev, "test": 0}[split]
        for number in range(count):
            rng = stream(seed, split, "sound", number)
            event = _cycle(EVENTS, number)
            path = f"media/sound/{split}_{number:05d}.wav"
            write_wav(out / path, event_wave(font, event, split, rng, round(SOUND_SECONDS * SAMPLE_RATE)))
            heard = {"media": (("audio", path),), "content": ((event,),)}
            question = rng.choice(("what do you hear", "which sound is this"))
            result[split].append(Example("sound_event", ((question, event),), **heard))
            if number < captions:
                turn = ("describe the sound", f"the sound of {_article(event)}")
                result[split].append(Example("caption_sound", (turn,), **heard))
    return result


def event_wave(font: SoundFont, event: str, split: str, rng: random.Random, count: int) -> np.ndarray:
    """``count`` samples at 16 kHz, of random loudness and noise. Keys that are multiples of 3 are for test only; of
    the other keys, dev has velocities that train has not."""
    key = rng.choice([key for key in range(45, 76) if (key % 3 == 0) == (split == "test")])
    velocity = rng.choice([v for v in range(60, 121) if split == "test" or (v % 4 == 0) == (split == "dev")])
    period = round(_REPEATED[event] * SAMPLE_RATE) if event in _REPEATED else count
    wave = np.resize(font.note(EVENTS[event], key, velocity, period / SAMPLE_RATE), count)
    noise = np.random.default_rng(rng.getrandbits(63)).standard_normal(count, np.float32)
    return scale_peak(wave, rng.uniform(0.2, 0.9)) + noise * np.float32(rng.uniform(0, 0.01))


def video_examples(out: Path, pictures: dict[str, list[Picture]], seed: int, sizes: Count, captions_dev: int) -> Split:
    """video_direction and video_object on every clip, and for train and some of dev caption_video."""
    result: Split = {split: [] for split in SPLITS}
    for split, count in zip(SPLITS, sizes, strict=True):
        captions = {"train": count, "dev": captions_dev, "test": 0}[split]
        chosen = _moving(pictures[split], seed, split, "video", count)
        for number, picture in enumerate(chosen):
            direction = _cycle(DIRECTIONS, number)
            path = f"media/video/{split}_{number:05d}.mp4"
            frames = move(*cut_out(picture.path), direction, stream(seed, split, "video", number))
            write_mp4(out / path, frames)
            thing = " ".join(picture.content)
            seen = {"media": (("video", path),), "content": ((*picture.content, direction),)}
            result[split].append(Example("video_direction", (("which way does it move", direction),), **seen))
            result[split].append(Example("video_object", (("what is moving", thing),), **seen))
            if number < captions:
                turn = ("describe the video", f"a {thing} moves {direction}")
                result[split].append(Example("caption_video", (turn,), **seen))
    return result


def video_sound_examples(
    out: Path, pictures: dict[str, list[Picture]], font: SoundFont, seed: int, sizes: Count
) -> Split:
    """video_sound: one MP4 file is both the video and the sound."""
    result: Split = {split: [] for split in SPLITS}
    for split, count in zip(SPLITS, sizes, strict=True):
        chosen = _moving(pictures[split], seed, split, "video_sound", count)
        for number, picture in enumerate(chosen):
            rng = stream(seed, split, "video_sound", number)
            # 4 and 12 are not coprime: step the direction on after every round of events.
            event = _cycle(EVENTS, number)
            direction = _cycle(DIRECTIONS, number + number // len(EVENTS))
            path = f"media/video/{split}_sound_{number:05d}.mp4"
            sound = event_wave(font, event, split, rng, SOUNDTRACK_SAMPLES)
            write_mp4(out / path, move(*cut_out(picture.path), direction, rng), np.clip(sound, -1, 1))
            turn = ("which way does it move and what do you hear", f"{direction} {event}")
            content = ((*picture.content, direction), (event,))
            result[split].append(Example("video_sound", (turn,), (("video", path), ("audio", path)), content))
    return result


def _moving(pictures: Sequence[Picture], seed: int, split: str, task: str, count: int) -> list[Picture]:
    known = [picture for picture in pictures if picture.content]
    return list(draw(known, count, stream(seed, split, task)))


def _cycle(names: dict[str, object], number: int) -> str:
    return list(names)[number % len(names)]


def _article(event: str) -> str:
    """Seashore and applause are no single things."""
    if event in ("seashore", "applause"):
        return event
    return f"an {event}" if event[0] in "aeiou" else f"a {event}"
