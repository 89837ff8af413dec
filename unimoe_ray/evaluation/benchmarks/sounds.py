"""Sounds: ClothoAQA and the captions of Clotho, whose prompt is that of Uni-MoE's ``data_sample/samples.json``."""

from __future__ import annotations

from collections.abc import Iterator

from unimoe_ray.data.schema import Media
from unimoe_ray.evaluation.benchmarks import files, scores, submit
from unimoe_ray.evaluation.benchmarks.base import SHORT, Benchmark, Decoding, Question
from unimoe_ray.evaluation.benchmarks.files import Folder

_CAPTIONS = tuple(f"caption_{n}" for n in range(1, 6))


def _clotho_aqa(folder: Folder, split: str) -> Iterator[Question]:
    """A row is one person's answer; the rows of a question are asked once."""
    sound = folder.media_in("audio_files")
    said: dict[tuple[str, str], list[str]] = {}
    for row in files.table(folder.one(f"clotho_aqa_{split}.csv")):
        said.setdefault((row.text("file_name"), row.text("QuestionText")), []).append(row.text("answer"))
    numbers: dict[str, int] = {}
    for (name, text), answers in said.items():
        numbers[name] = numbers.get(name, 0) + 1
        yield Question(
            f"{name}#{numbers[name]}",
            f"<audio>\n{text}\n{SHORT}",
            (Media("audio", (sound(name),)),),
            tuple(answers),
            group=name,
        )


def _clotho(folder: Folder, split: str) -> Iterator[Question]:
    sound = folder.media_in(split)
    for row in files.table(folder.one(f"clotho_captions_{split}.csv")):
        name = row.text("file_name")
        captions = tuple(row.text(column) for column in _CAPTIONS)
        yield Question(
            name, "<audio>\nGenerate audio caption.", (Media("audio", (sound(name),)),), captions, group=name
        )


BENCHMARKS = (
    Benchmark(
        "clotho-aqa",
        "ClothoAQA",
        "clotho_aqa_SPLIT.csv; sounds in audio_files/",
        ("test", "val", "train"),
        Decoding(512, temperature=0.9, beams=4),
        _clotho_aqa,
        scores.exact_score,
        submit.json_map("predictions.json", lambda a: a.answer),
    ),
    Benchmark(
        "clotho",
        "Clotho captions, v1 or v2",
        "clotho_captions_SPLIT.csv; sounds in SPLIT/",
        ("evaluation", "validation", "development"),
        Decoding(512, temperature=1.0, beams=5),
        _clotho,
        scores.cider_score,
        submit.csv_of("clotho.csv", ("file_name", "caption_predicted"), lambda a: (a.question.id, a.answer)),
    ),
)
