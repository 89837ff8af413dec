"""Questions about pictures with short or free answers: A-OKVQA, OK-VQA, VQAv2, TextVQA, POPE, MM-Vet.

The prompts are those of the files in Uni-MoE's ``data_sample``; POPE's is LLaVA-1.5's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from unimoe_ray.data.schema import Media
from unimoe_ray.evaluation.benchmarks import files, scores, submit
from unimoe_ray.evaluation.benchmarks.base import GREEDY, SAMPLED, SHORT, Answered, Benchmark, Question
from unimoe_ray.evaluation.benchmarks.files import Entry, Folder

# COCO's names of splits, of the questions and of their pictures
_VQA_SPLITS = {
    "val": ("val2014", "val2014"),
    "test-dev": ("test-dev2015", "test2015"),
    "test": ("test2015", "test2015"),
}


def _short(question: str) -> str:
    return f"<image>\n{question}\n{SHORT}"


def _image(path: str) -> tuple[Media, ...]:
    return (Media("image", (path,)),)


def _vqa(questions: str, annotations: str) -> Callable[[Folder, str], Iterator[Question]]:
    """Pairs of questions and annotations, as VQA has them; ``{}`` in their names is COCO's name of the split."""

    def read(folder: Folder, split: str) -> Iterator[Question]:
        asked, pictures = _VQA_SPLITS[split]
        image = folder.media_in(pictures)
        entries = files.json_list(folder.one(questions.format(asked)), "questions")
        if split != "val":  # the answers are with the server
            pairs: Iterator[tuple[Entry, Entry | None]] = ((entry, None) for entry in entries)
        else:
            said = files.json_list(folder.one(annotations.format(asked)), "annotations")
            pairs = files.joined(entries, said, "question_id")
        for entry, answers in pairs:
            name = f"COCO_{pictures}_{entry.number('image_id'):012}.jpg"
            yield Question(
                str(entry.number("question_id")),
                _short(entry.text("question")),
                _image(image(name)),
                () if answers is None else _answers(answers),
                group=str(entry["image_id"]),
                facts={"type": "" if answers is None else answers["answer_type"]},
            )

    return read


def _answers(entry: Entry) -> tuple[str, ...]:
    people = entry["answers"]
    if not isinstance(people, list) or not all(isinstance(person, dict) for person in people):
        people = [{}]
    return tuple(Entry(entry.file, f"{entry.where}, answers", person).text("answer") for person in people)


def _aokvqa(folder: Folder, split: str) -> Iterator[Question]:
    image = folder.media_in(f"{split}2017")
    for entry in files.json_list(folder.one(f"aokvqa_v1p*_{split}.json")):
        yield Question(
            entry.text("question_id"),
            _short(entry.text("question")),
            _image(image(f"{entry.number('image_id'):012}.jpg")),
            () if split == "test" else entry.texts("direct_answers"),
            group=str(entry["image_id"]),
            facts={"difficult": bool(entry["difficult_direct_answer"])},
        )


def _textvqa(folder: Folder, split: str) -> Iterator[Question]:
    image = folder.media_in("test_images" if split == "test" else "train_images")
    for entry in files.json_list(folder.one(f"TextVQA_0.5*_{split}.json"), "data"):
        yield Question(
            str(entry.number("question_id")),
            _short(entry.text("question").capitalize()),
            _image(image(f"{entry.text('image_id')}.jpg")),
            () if split == "test" else entry.texts("answers"),
            group=entry.text("image_id"),
        )


def _pope(folder: Folder, split: str) -> Iterator[Question]:
    image = folder.media_in("val2014")
    for file in folder.many("*pope_*.json", "coco/*pope_*.json", "output/coco/*pope_*.json"):
        subset = file.stem.rpartition("_")[2]
        for entry in files.json_lines(file):
            yield Question(
                f"{subset}-{entry.number('question_id')}",
                _short(entry.text("text")),
                _image(image(entry.text("image"))),
                (entry.text("label"),),
                group=entry.text("image"),
                facts={"subset": subset, "text": entry["text"]},
            )


def _mm_vet(folder: Folder, split: str) -> Iterator[Question]:
    image = folder.media_in("images")
    for name, entry in files.json_object(folder.one("mm-vet.json")):
        yield Question(
            name,
            f"<image>\n{entry.text('question')}",
            _image(image(entry.text("imagename"))),
            (entry.text("answer"),),
            group=entry.text("imagename"),
        )


def _vqa_result(a: Answered) -> dict[str, object]:
    return {"question_id": int(a.question.id), "answer": a.answer}


BENCHMARKS = (
    Benchmark(
        "a-okvqa",
        "A-OKVQA, direct answers",
        "aokvqa_v1p0_SPLIT.json; pictures in SPLIT2017/",
        ("val", "test"),
        GREEDY,
        _aokvqa,
        scores.aokvqa_score,
        submit.json_map("predictions.json", lambda a: {"multiple_choice": "", "direct_answer": a.answer}),
    ),
    Benchmark(
        "ok-vqa",
        "OK-VQA",
        "OpenEnded_mscoco_val2014_questions.json, mscoco_val2014_annotations.json; pictures in val2014/",
        ("val",),
        GREEDY,
        _vqa("OpenEnded_mscoco_{}_questions.json", "mscoco_{}_annotations.json"),
        scores.vqa_score(),
        submit.json_of("results.json", _vqa_result),
    ),
    Benchmark(
        "vqav2",
        "VQAv2",
        "v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json; pictures in val2014/",
        ("val", "test-dev", "test"),
        GREEDY,
        _vqa("v2_OpenEnded_mscoco_{}_questions.json", "v2_mscoco_{}_annotations.json"),
        scores.vqa_score("type"),
        submit.json_of("results.json", _vqa_result),
    ),
    Benchmark(
        "textvqa",
        "TextVQA, without OCR tokens",
        "TextVQA_0.5.1_SPLIT.json; pictures in train_images/ or test_images/",
        ("val", "test"),
        GREEDY,
        _textvqa,
        scores.textvqa_score,
        submit.json_of("results.json", _vqa_result),
    ),
    Benchmark(
        "pope",
        "POPE, object hallucination",
        "coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json; pictures in val2014/",
        ("test",),
        GREEDY,
        _pope,
        scores.pope_score,
        submit.json_lines(
            "{}.jsonl", lambda a: {"question": a.question.facts["text"], "answer": a.answer}, by="subset"
        ),
    ),
    Benchmark(
        "mm-vet",
        "MM-Vet, for its judge",
        "mm-vet.json; pictures in images/",
        ("test",),
        SAMPLED,
        _mm_vet,
        None,
        submit.json_map("mm-vet.json", lambda a: a.answer),
    ),
)
