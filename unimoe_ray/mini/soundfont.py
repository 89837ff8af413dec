"""A reader of SoundFont 2 files that plays single notes: sample, loop, pitch and attenuation, no filters or effects.

Source: SoundFont Technical Specification 2.01, chapters 7 and 8.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unimoe_ray.errors import UnimoeError
from unimoe_ray.mini.waveform import SAMPLE_RATE

# Generator numbers (section 8.1.2).
_INSTRUMENT, _SAMPLE, _KEY_RANGE, _VELOCITY_RANGE = 41, 53, 43, 44
_ATTENUATION, _COARSE_TUNE, _FINE_TUNE, _SAMPLE_MODES, _SCALE_TUNING, _ROOT_KEY = 48, 51, 52, 54, 56, 58
_FULL_RANGE = 127 << 8

# Record layouts (sections 7.2 to 7.10), without modulators.
_TABLES = {
    b"phdr": "<20sHHHIII",
    b"pbag": "<HH",
    b"pgen": "<HH",
    b"inst": "<20sH",
    b"ibag": "<HH",
    b"igen": "<HH",
    b"shdr": "<20sIIIIIBbHH",
}


@dataclass(frozen=True)
class _Zone:
    """One sample to play for a key: slice of the pool, its loop, its step at 16 kHz (samples), its gain."""

    start: int
    end: int
    loop: tuple[int, int] | None
    step: float
    gain: float


class SoundFont:
    """The presets and samples of one ``.sf2`` file. Raises UnimoeError when the file is not one."""

    def __init__(self, path: Path):
        data = path.read_bytes()
        try:
            chunks = dict(_walk(data, 0, len(data)))
            begin, size = chunks[b"smpl"]
            self._pool = np.frombuffer(data, "<i2", size // 2, begin)
            tables = {name: _rows(data, *chunks[name], layout) for name, layout in _TABLES.items()}
        except (KeyError, ValueError, struct.error) as error:
            raise UnimoeError(f"{path}: not a SoundFont 2 file ({error!r})") from None
        self._presets, self._instruments, self._samples = tables[b"phdr"], tables[b"inst"], tables[b"shdr"]
        self._bags = {"preset": tables[b"pbag"], "instrument": tables[b"ibag"]}
        self._generator_rows = {"preset": tables[b"pgen"], "instrument": tables[b"igen"]}

    def note(self, program: int, key: int, velocity: int, seconds: float) -> np.ndarray:
        """A note of a General MIDI program (bank 0), float32 [samples] at 16 kHz, faded out over the last 80 ms.

        key, velocity: MIDI, 0 to 127. Raises UnimoeError when no sample answers that note.
        """
        zones = self._zones(program, key, velocity)
        if not zones:
            raise UnimoeError(f"the sound font has no sample for program {program}, key {key}, velocity {velocity}")
        wave = sum(self._play(zone, round(seconds * SAMPLE_RATE)) for zone in zones)
        fade = min(len(wave), round(0.08 * SAMPLE_RATE))
        wave[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
        return wave * np.float32(velocity / 127)

    def _zones(self, program: int, key: int, velocity: int) -> list[_Zone]:
        preset = next((i for i, p in enumerate(self._presets[:-1]) if p[1:3] == (program, 0)), None)
        if preset is None:
            return []
        zones = []
        for outer in self._generators("preset", self._presets[preset][3], self._presets[preset + 1][3]):
            if _INSTRUMENT not in outer or not _within(outer.get(_KEY_RANGE, _FULL_RANGE), key):
                continue
            instrument, shared = outer[_INSTRUMENT], {}
            bags = self._generators(
                "instrument", self._instruments[instrument][1], self._instruments[instrument + 1][1]
            )
            for number, own in enumerate(bags):
                if _SAMPLE not in own:
                    # Only a first zone without a sample is global.
                    shared = own if number == 0 else shared
                    continue
                merged = {**shared, **own}
                in_key = _within(merged.get(_KEY_RANGE, _FULL_RANGE), key)
                if in_key and _within(merged.get(_VELOCITY_RANGE, _FULL_RANGE), velocity):
                    zones.append(self._zone(merged, key))
        return zones

    def _generators(self, level: str, first: int, last: int):
        bags, generators = self._bags[level], self._generator_rows[level]
        for bag in range(first, last):
            yield dict(generators[bags[bag][0] : bags[bag + 1][0]])

    def _zone(self, generators: dict[int, int], key: int) -> _Zone:
        _, start, end, loop_start, loop_end, rate, original_key, correction, _, _ = self._samples[generators[_SAMPLE]]
        root = generators.get(_ROOT_KEY, original_key)
        root = original_key if root > 127 else root
        cents = (key - root) * generators.get(_SCALE_TUNING, 100) + correction
        cents += _signed(generators.get(_FINE_TUNE, 0)) + 100 * _signed(generators.get(_COARSE_TUNE, 0))
        looped = generators.get(_SAMPLE_MODES, 0) & 1 and loop_end > loop_start + 8
        return _Zone(
            start,
            end,
            (loop_start - start, loop_end - start) if looped else None,
            rate / SAMPLE_RATE * 2 ** (cents / 1200),
            10 ** (-_signed(generators.get(_ATTENUATION, 0)) / 200),
        )

    def _play(self, zone: _Zone, count: int) -> np.ndarray:
        """Linear interpolation between the samples, as the specification asks for at least."""
        position = np.arange(count) * zone.step
        if zone.loop:
            begin, end = zone.loop
            position = np.where(position >= end, (position - end) % (end - begin) + begin, position)
        inside = position < zone.end - zone.start - 1
        position = position[inside]
        samples = self._pool[zone.start : zone.end + 1].astype(np.float32) / 32768
        index = position.astype(np.int64)
        fraction = (position - index).astype(np.float32)
        wave = np.zeros(count, np.float32)
        wave[inside] = samples[index] * (1 - fraction) + samples[index + 1] * fraction
        return wave * np.float32(zone.gain)


def _walk(data: bytes, position: int, end: int):
    """(name, (begin, size)) of every leaf chunk of a RIFF file."""
    while position < end:
        name, size = struct.unpack_from("<4sI", data, position)
        if position + 8 + size > end:
            raise ValueError(f"chunk {name!r} is longer than the file")
        if name in (b"RIFF", b"LIST"):
            yield from _walk(data, position + 12, position + 8 + size)
        else:
            yield name, (position + 8, size)
        position += 8 + size + (size & 1)


def _rows(data: bytes, begin: int, size: int, layout: str) -> list[tuple]:
    return list(struct.iter_unpack(layout, data[begin : begin + size - size % struct.calcsize(layout)]))


def _within(bounds: int, value: int) -> bool:
    """Ranges are packed as low byte: lowest, high byte: highest."""
    return bounds & 255 <= value <= bounds >> 8


def _signed(value: int) -> int:
    return value - 65536 if value >= 32768 else value
