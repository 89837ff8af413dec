"""Speech synthesis by the eSpeak NG shared library, called through ctypes.

eSpeak keeps the phase of its oscillators and more from one utterance to the next, in global variables that even
starting it anew does not reset. The same clips are therefore to be had only from a fresh process and in one order:
``speaking`` starts such a process, which is this module run as a program.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

import unimoe_ray
from unimoe_ray.errors import UnimoeError
from unimoe_ray.mini.waveform import SAMPLE_RATE, resample, scale_peak, trim, write_wav

ACCENTS = ("en-us", "en-gb-x-rp", "en-gb-scotland")
# Without those whose breath noise differs from process to process (Alicia, f2, f3, f5, sandro, victor).
_VARIANTS = (
    "Alex Andrea Andy Annie Denis Diogo Gene Henrique Hugo Jacky Lee Marco Mario Michael Mike Mr Nguyen Reed Storm "
    "adam anika announcer antonio aunty belinda benjamin boris caleb david ed edward f1 f4 grandma grandpa gustave ian "
    "iven john linda m1 m2 m3 m4 m5 m6 m7 m8 marcelo max michel miguel norbert pablo paul pedro quincy rob robert "
    "shelby steph travis zac"
)
VARIANTS = tuple(_VARIANTS.split())

# Values of enums in speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_RATE, _PITCH = 1, 3
_CHARS_UTF8 = 1

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Utterance(NamedTuple):
    """path: the WAV file to write; rate, pitch: see ``Espeak.say``; peak: largest absolute value of the wave;
    before, after: seconds of silence around it."""

    path: str
    text: str
    voice: str
    rate: int
    pitch: int
    peak: float
    before: float
    after: float


class Espeak:
    """The library, initialised. ``voices`` are given as ``accent+variant``, see ACCENTS and VARIANTS."""

    def __init__(self, library: Path, data: Path):
        try:
            self._lib = ctypes.CDLL(str(library))
        except OSError as error:
            raise UnimoeError(f"{library}: can't be loaded ({error})") from None
        # It looks for the folder espeak-ng-data in the folder that it is given.
        self.sample_rate = self._lib.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, str(data).encode(), 0)
        if self.sample_rate <= 0:
            raise UnimoeError(f"{data}: eSpeak finds no usable espeak-ng-data there")
        self._chunks: list[np.ndarray] = []
        self._callback = _Callback(self._collect)
        self._lib.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples, count: int, events) -> int:
        if count > 0 and samples:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, voice: str, rate: int, pitch: int) -> np.ndarray:
        """One utterance as float32 [samples] at 16 kHz, silence at both ends trimmed.

        rate: words per minute, 80 to 450; pitch: 0 to 100. Raises UnimoeError for an unknown voice or empty sound.
        """
        self._chunks.clear()
        if self._lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise UnimoeError(f"eSpeak has no voice {voice!r}")
        self._lib.espeak_SetParameter(_RATE, rate, 0)
        self._lib.espeak_SetParameter(_PITCH, pitch, 0)
        data = text.encode() + b"\0"
        # Arguments: text, size, start position, its unit, end position, flags, two unused results.
        status = self._lib.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, 0, 0, _CHARS_UTF8, None, None)
        self._lib.espeak_Synchronize()
        if status != 0 or not self._chunks:
            raise UnimoeError(f"eSpeak says nothing for {text!r} with voice {voice!r}")
        wave = np.concatenate(self._chunks).astype(np.float32) / 32768
        return trim(resample(wave, self.sample_rate))

    def say_within(self, text: str, voice: str, rate: int, pitch: int, seconds: float) -> np.ndarray:
        """As ``say``, faster where needed so that the utterance is no longer than ``seconds``."""
        while True:
            wave = self.say(text, voice, rate, pitch)
            if len(wave) <= seconds * SAMPLE_RATE:
                return wave
            if rate > 400:
                raise UnimoeError(f"eSpeak can't say {text!r} within {seconds} s with voice {voice!r}")
            rate += 20


@contextmanager
def speaking(folder: Path, utterances: Sequence[Utterance], seconds: float) -> Iterator[None]:
    """Within the context another process writes the utterances, each at most ``seconds`` long; its end waits for them.

    folder: ``libespeak-ng*`` beside ``espeak-ng-data``. Raises UnimoeError if the files could not be made.
    """
    libraries = sorted(folder.glob("libespeak-ng*"))
    if not libraries:
        raise UnimoeError(f"{folder}: no libespeak-ng in it")
    package_root = str(Path(unimoe_ray.__file__).parent.parent)
    search_path = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": search_path},
    )
    with process, ExitStack() as unfinished:
        unfinished.callback(process.kill)
        # A process that ended at once has its reason on stderr.
        with suppress(BrokenPipeError), process.stdin:
            json.dump([str(libraries[0]), str(folder), seconds, utterances], process.stdin)
        yield
        unfinished.pop_all()
        errors = process.stderr.read().strip().splitlines()
    if process.returncode:
        raise UnimoeError(errors[-1] if errors else f"the speech synthesis ended with status {process.returncode}")


def _write_all(espeak: Espeak, seconds: float, utterances: Iterable[Utterance]) -> None:
    for item in utterances:
        room = seconds - item.before - item.after
        wave = espeak.say_within(item.text, item.voice, item.rate, item.pitch, room)
        silence = (round(item.before * SAMPLE_RATE), round(item.after * SAMPLE_RATE))
        write_wav(Path(item.path), np.pad(scale_peak(wave, item.peak), silence))


def _main() -> int:
    library, folder, seconds, utterances = json.load(sys.stdin)
    try:
        _write_all(Espeak(Path(library), Path(folder)), seconds, [Utterance(*item) for item in utterances])
    except (OSError, UnimoeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
