"""Speech: spoken_word, transcribe, spoken_question and real_digits."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from unimoe_ray.errors import UnimoeError
from unimoe_ray.mini.espeak import ACCENTS, VARIANTS, Utterance
from unimoe_ray.mini.example import SPLITS, Count, Example, Split, draw, stream
from unimoe_ray.mini.image_tasks import media_path
from unimoe_ray.mini.questions import Picture
from unimoe_ray.mini.waveform import SAMPLE_RATE, read_mono, scale_peak, trim, write_wav

MAX_SECONDS = 1.92
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = (*NUMBERS, "red", "green", "blue", "yellow", "circle", "square", "cat", "dog", "house", "water")
COMMANDS = (
    "stop",
    "turn left",
    "turn right",
    "go up",
    "go down",
    "open the door",
    "close the door",
    "play music",
    "switch on the light",
    "switch off the light",
)
PHRASES = WORDS + COMMANDS
SPOKEN_QUESTIONS = ("what shape is in the image", "what color is the shape")
SPEAKERS = ("tuxpaint_en", "tuxpaint_en_gb", "asterisk")


@dataclass
class Speech:
    """The examples on clips, and the clips that are still to be spoken."""

    examples: Split = field(default_factory=lambda: {split: [] for split in SPLITS})
    utterances: list[Utterance] = field(default_factory=list)


def split_voices() -> dict[str, list[str]]:
    """44 training voices, 6 for dev, 12 for test; the same ones for every seed."""
    voices = random.Random("voices").sample(VARIANTS, 62)
    return {"train": voices[:44], "dev": voices[44:50], "test": voices[50:]}


def speech_examples(
    out: Path,
    pictures: dict[str, list[Picture]],
    seed: int,
    words: Count,
    takes: int,
    questions: Count,
    captions_dev: int,
) -> Speech:
    """spoken_word and spoken_question, and transcribe in train and dev. Every phrase by as many voices as ``words``
    allows, every spoken question at most ``takes`` times by a voice."""
    speech = Speech()
    for split, word_count, question_count in zip(SPLITS, words, questions, strict=True):
        voices = split_voices()[split]
        spoken = _say_phrases(out, speech, seed, split, word_count, voices)
        rng = stream(seed, split, "spoken_question")
        ways = [(voice, take) for voice in voices for take in range(takes)]
        asked = {
            question: [
                _say(out, speech, seed, split, question, voice, take)
                for voice, take in rng.sample(ways, min(len(ways), -(-question_count // len(SPOKEN_QUESTIONS))))
            ]
            for question in SPOKEN_QUESTIONS
        }
        known = [picture for picture in pictures[split] if picture.content]
        for number, picture in enumerate(draw(known, question_count, rng)):
            colour, shape = picture.content
            question, answer = list(zip(SPOKEN_QUESTIONS, (shape, colour), strict=True))[number % 2]
            path = asked[question][number // 2 % len(asked[question])]
            media = (("image", media_path(out, split, picture)), ("speech", path))
            content = (picture.content, tuple(question.split()))
            example = Example("spoken_question", (("answer the question", answer),), media, content)
            speech.examples[split].append(example)
        spoken += [(question, path) for question, paths in asked.items() for path in paths]
        for text, path in spoken[: {"train": len(spoken), "dev": captions_dev, "test": 0}[split]]:
            speech.examples[split].append(_heard("transcribe", "transcribe the speech", text, path))
    return speech


def _say_phrases(
    out: Path, speech: Speech, seed: int, split: str, count: int, voices: list[str]
) -> list[tuple[str, str]]:
    """``count`` clips of spoken_word, phrases in turn; (text, path) of each."""
    rng = stream(seed, split, "spoken_word")
    order = {phrase: list(draw(voices, -(-count // len(PHRASES)), rng)) for phrase in PHRASES}
    spoken = []
    for number in range(count):
        phrase = PHRASES[number % len(PHRASES)]
        take = number // len(PHRASES)
        path = _say(out, speech, seed, split, phrase, order[phrase][take], take)
        question = rng.choice(("what was said", "repeat the words"))
        speech.examples[split].append(_heard("spoken_word", question, phrase, path))
        spoken.append((phrase, path))
    return spoken


def _say(out: Path, speech: Speech, seed: int, split: str, text: str, variant: str, take: int) -> str:
    rng = stream(seed, split, "speech", text, variant, take)
    path = f"media/speech/{split}_{text.replace(' ', '_')}_{variant}_{take}.wav"
    voice = f"{rng.choice(ACCENTS)}+{variant}"
    rate, pitch, peak = rng.randint(130, 190), rng.randint(30, 70), rng.uniform(0.3, 0.95)
    silence = rng.uniform(0.05, 0.2), rng.uniform(0.05, 0.15)
    speech.utterances.append(Utterance(str(out / path), text, voice, rate, pitch, peak, *silence))
    return path


def _heard(task: str, question: str, text: str, path: str) -> Example:
    return Example(task, ((question, text),), (("speech", path),), (tuple(text.split()),))


def digit_examples(out: Path, folder: Path) -> list[Example]:
    """real_digits: every recording of a human being there is, zero to nine by up to three speakers."""
    examples = []
    for speaker in SPEAKERS:
        for digit, word in enumerate(NUMBERS):
            for source in sorted((folder / speaker).glob(f"{digit}.*")):
                path = f"media/speech/human_{speaker}_{digit}.wav"
                try:
                    wave = read_mono(source)
                except RuntimeError as error:
                    raise UnimoeError(f"{source}: {error}") from None
                wave = trim(wave, threshold=0.03)[: round(MAX_SECONDS * SAMPLE_RATE)]
                write_wav(out / path, scale_peak(wave, 0.8))
                examples.append(_heard("real_digits", "what was said", word, path))
    return examples
