"""The small task suite of the embedded default: real files and conversations, made from a seed.

Held out are pictures (the official test splits), voices, pitches, and questions of the text task.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from unimoe_ray.errors import UnimoeError, UsageError
from unimoe_ray.mini.espeak import speaking
from unimoe_ray.mini.example import SPLITS, Count, Split, stream
from unimoe_ray.mini.image_tasks import fashion_examples, image_examples, split_pictures
from unimoe_ray.mini.sound_tasks import sound_examples, video_examples, video_sound_examples
from unimoe_ray.mini.soundfont import SoundFont
from unimoe_ray.mini.speech_tasks import MAX_SECONDS, digit_examples, speech_examples
from unimoe_ray.mini.text_task import text_examples
from unimoe_ray.mini.verbalise import words_examples
from unimoe_ray.mini.wording import reword

SUITE_FILE = "suite.json"
Progress = Callable[[str], None]


class Assets(Protocol):
    """Folders of the assets, see ``unimoe_ray.mini.assets``."""

    def path(self, name: str) -> Path: ...

    def optional(self, name: str) -> Path | None: ...


@dataclass(frozen=True)
class SuiteScale:
    """How much of everything, as (train, dev, test). ``image_vqa.train`` counts questions, the others records;
    ``words`` all verbalised training records together, ``words_dev`` those of each task."""

    pictures: int = 3700
    image_vqa: Count = Count(20_000, 150, 300)
    fashion: Count = Count(3000, 150, 200)
    spoken_word: Count = Count(1320, 150, 300)
    question_takes: int = 3
    spoken_question: Count = Count(2500, 150, 250)
    sound_event: Count = Count(600, 120, 240)
    video: Count = Count(1600, 150, 250)
    video_sound: Count = Count(700, 120, 200)
    text: Count = Count(1500, 150, 200)
    captions_dev: int = 60
    words: int = 24_000
    words_dev: int = 60

    @classmethod
    def tiny(cls) -> SuiteScale:
        """A few records of every task, for tests."""
        return cls(
            pictures=60,
            image_vqa=Count(240, 10, 12),
            fashion=Count(60, 8, 10),
            spoken_word=Count(60, 10, 12),
            question_takes=1,
            spoken_question=Count(48, 8, 10),
            sound_event=Count(24, 12, 12),
            video=Count(24, 8, 12),
            video_sound=Count(24, 8, 12),
            text=Count(400, 10, 12),
            captions_dev=4,
            words=200,
            words_dev=4,
        )


def build(out: Path, assets: Assets, seed: int, scale: SuiteScale, on_progress: Progress | None = None) -> dict:
    """Write the suite into the folder ``out`` and return what its suite.json says.

    All or nothing: it is made beside ``out`` and renamed; an earlier suite there is replaced. The same seed, scale
    and assets give the same bytes. Raises UsageError when ``out`` is a folder of something else, UnimoeError when an
    asset is damaged or the files can't be written. ``on_progress`` is given short strings.
    """
    out = Path(out)
    if out.exists() and not (out / SUITE_FILE).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: is there and is no suite; name another folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
            made = Path(scratch) / "suite"
            made.mkdir()
            summary = _make(made, assets, seed, scale, on_progress or (lambda text: None))
            if out.exists():
                out.rename(Path(scratch) / "replaced")
            made.rename(out)
    except OSError as error:
        raise UnimoeError(f"the suite can't be made in {out}: {error}") from None
    return summary


def content_hash(folder: Path) -> str:
    """sha256 over names and bytes of all files of a suite but suite.json."""
    total = hashlib.sha256()
    for path in sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()):
        if path != SUITE_FILE:
            digest = hashlib.sha256((folder / path).read_bytes()).hexdigest()
            total.update(f"{path}\0{digest}\n".encode())
    return total.hexdigest()


def _make(out: Path, assets: Assets, seed: int, scale: SuiteScale, say: Progress) -> dict:
    examples = _examples(out, assets, seed, scale, say)
    say("suite: writing conversations")
    for split in SPLITS:
        numbers: Counter[str] = Counter()
        records = []
        for example in examples[split]:
            records.append(example.record(f"{example.task}-{split}-{numbers[example.task]:05d}"))
            numbers[example.task] += 1
        lines = ",\n".join(json.dumps(record) for record in records)
        (out / f"{split}.json").write_text(f"[\n{lines}\n]\n")
    summary = {
        "hash": content_hash(out),
        "seed": seed,
        "scale": asdict(scale),
        "counts": {split: dict(Counter(example.task for example in examples[split])) for split in SPLITS},
        "tasks": sorted({example.task for split in SPLITS for example in examples[split]}),
        "answers": _distinct_answers(examples),
    }
    (out / SUITE_FILE).write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _examples(out: Path, assets: Assets, seed: int, scale: SuiteScale, say: Progress) -> Split:
    pictures = split_pictures(assets.path("easy_vqa"), scale.pictures)
    font = SoundFont(assets.path("timgm6mb") / "TimGM6mb.sf2")
    say("suite: speech and pictures")
    few = scale.captions_dev
    speech = speech_examples(out, pictures, seed, scale.spoken_word, scale.question_takes, scale.spoken_question, few)
    with speaking(assets.path("espeak"), speech.utterances, MAX_SECONDS):
        parts = [image_examples(out, pictures, seed, scale.image_vqa, few)]
        if fashion := assets.optional("fashion_mnist"):
            parts.append(fashion_examples(out, fashion, seed, scale.fashion))
        parts.append(speech.examples)
        if digits := assets.optional("human_digits"):
            parts.append({"test": digit_examples(out, digits)})
        say("suite: sounds")
        parts.append(sound_examples(out, font, seed, scale.sound_event, few))
        say("suite: videos")
        parts.append(video_examples(out, pictures, seed, scale.video, few))
        parts.append(video_sound_examples(out, pictures, font, seed, scale.video_sound))
        text_sizes = zip(SPLITS, scale.text, strict=True)
        parts.append({split: text_examples(seed, split, count) for split, count in text_sizes})
        examples = {split: [example for part in parts for example in part.get(split, [])] for split in SPLITS}
        say("suite: conversations in words")
        for split in ("train", "dev"):
            examples[split] += words_examples(seed, split, examples[split], scale.words, scale.words_dev)
        rng = stream(seed, "train", "wording")
        examples["train"] = [reword(example, rng) for example in examples["train"]]
        say("suite: waiting for speech")
    return examples


def _distinct_answers(examples: Split) -> dict[str, int]:
    answers: dict[str, set[str]] = {}
    for split in SPLITS:
        for example in examples[split]:
            answers.setdefault(example.task, set()).update(answer for _, answer in example.turns)
    return {task: len(answers[task]) for task in sorted(answers)}
