"""Small folders of every benchmark, in the format in which it is published, with real media in it."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.serving.media import mp4, png, wav

TEN = ["red"] * 6 + ["dark red"] * 2 + ["maroon", "Red."]


def coco_vqa(root: Path, prefix: str = "v2_", count: int = 3) -> Path:
    """VQAv2; OK-VQA without prefix. A picture has two questions."""
    (root / "val2014").mkdir(parents=True)
    questions, annotations = [], []
    for picture in range(100, 100 + count):
        (root / "val2014" / f"COCO_val2014_{picture:012}.jpg").write_bytes(png(picture, 32))
        for number in range(2):
            name = picture * 1000 + number
            questions.append({"image_id": picture, "question": f"What colour is part {number}?", "question_id": name})
            said = [{"answer": a, "answer_confidence": "yes", "answer_id": i + 1} for i, a in enumerate(TEN)]
            annotations.append(
                {"question_type": "what color", "multiple_choice_answer": "red", "answers": said, "image_id": picture}
                | {"answer_type": ("other", "yes/no")[number], "question_id": name}
            )
    about = {"info": {"version": "2.0"}, "license": {"name": "CC"}, "data_subtype": "val2014"}
    name = f"{prefix}OpenEnded_mscoco_val2014_questions.json"
    write(root / name, about | {"task_type": "Open-Ended", "questions": questions})
    write(root / f"{prefix}mscoco_val2014_annotations.json", about | {"annotations": annotations})
    return root


def aokvqa(root: Path) -> Path:
    (root / "val2017").mkdir(parents=True)
    (root / "val2017" / "000000461751.jpg").write_bytes(png(1, 32))
    entry = {
        "split": "val",
        "image_id": 461751,
        "question_id": "22jbM6gDxdaMaunuzgrsBB",
        "question": "What is in the motorcyclist's mouth?",
        "choices": ["toothpick", "food", "popsicle stick", "cigarette"],
        "correct_choice_idx": 3,
        "direct_answers": ["cigarette"] * 9 + ["cigar"],
        "difficult_direct_answer": False,
        "rationales": ["He's smoking."],
    }
    hard = entry | {
        "question_id": "hard",
        "difficult_direct_answer": True,
        "direct_answers": ["x", "y", "z"] * 3 + ["w"],
    }
    write(root / "aokvqa_v1p0_val.json", [entry, hard])
    return root


def textvqa(root: Path) -> Path:
    (root / "train_images").mkdir(parents=True)
    (root / "train_images" / "003a8ae2ef43b901.jpg").write_bytes(png(2, 32))
    entry = {
        "question": "what is the brand of this camera?",
        "image_id": "003a8ae2ef43b901",
        "image_classes": ["Camera"],
        "answers": ["nous les gosses", "dakota", *["dakota digital"] * 4, *["dakota"] * 2, "clos culombu", "dakota 1"],
        "question_tokens": ["what", "is", "the", "brand", "of", "this", "camera"],
        "question_id": 34602,
        "set_name": "val",
    }
    about = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    write(root / "TextVQA_0.5.1_val.json", about | {"data": [entry]})
    return root


def pope(root: Path) -> Path:
    (root / "val2014").mkdir(parents=True)
    image = "COCO_val2014_000000310196.jpg"
    (root / "val2014" / image).write_bytes(png(3, 32))
    for subset in ("random", "popular", "adversarial"):
        lines = [
            {"question_id": i + 1, "image": image, "text": f"Is there a {thing} in the image?", "label": label}
            for i, (thing, label) in enumerate([("snowboard", "yes"), ("backpack", "no"), ("person", "yes")])
        ]
        (root / f"coco_pope_{subset}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def mm_vet(root: Path) -> Path:
    (root / "images").mkdir(parents=True)
    (root / "images" / "v1_0.png").write_bytes(png(4, 32))
    entry = {"imagename": "v1_0.png", "question": "What is x in the equation?", "answer": "-1<AND>-5"}
    write(root / "mm-vet.json", {"v1_0": entry | {"imagesource": "web", "capability": ["ocr", "math"]}})
    return root


def mmbench(root: Path) -> Path:
    """Question 241 in two orders, the second with a picture by reference; question 252 in one."""
    root.mkdir(parents=True)
    picture = base64.b64encode(png(5, 16)).decode()
    header = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category"]
    header += ["comment", "split"]
    tail = ["scienceqa", "attribute_reasoning", "", "dev"]
    rows = [
        ["241", "Which\nis it?", "nan", "a cat", "a dog", "", "", "B", "identity", picture, *tail],
        ["252", 'What "colour"?', "It is bright.", "red", "blue", "green", "grey", "C", "physical", picture, *tail],
        ["1000241", "Which\nis it?", "nan", "a dog", "a cat", "", "", "A", "identity", "241", *tail],
    ]
    with open(root / "mmbench_dev_20230712.tsv", "w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([header, *rows])
    return root


def seed(root: Path) -> Path:
    (root / "SEED-Bench-image").mkdir(parents=True)
    (root / "SEED-Bench-video").mkdir()
    (root / "SEED-Bench-image" / "1454426_2591111986").write_bytes(png(6, 32))
    (root / "SEED-Bench-video" / "79582.mp4").write_bytes(mp4(0, 4))
    choices = {"choice_a": "One", "choice_b": "Two", "choice_c": "Three", "choice_d": "Four"}
    image = {"answer": "A", "data_id": "1454426_2591111986", "data_type": "image", "question_id": "101669"}
    video = {"answer": "D", "data_id": "79582.mp4", "data_type": "video", "question_id": "v10", "segment": [0, 1]}
    questions = [
        choices | image | {"question": "How many towels are there?", "question_type_id": 5},
        choices | video | {"question": "What happens next?", "question_type_id": 11},
    ]
    write(root / "SEED-Bench.json", {"question_type": {"Instance Counting": 5}, "questions": questions})
    return root


def mmbench_audio(root: Path) -> Path:
    """Uni-MoE's format: media without placeholders in the text, a list of one picture."""
    root.mkdir(parents=True)
    (root / "241.png").write_bytes(png(7, 32))
    (root / "241.wav").write_bytes(wav(1, 1.0))
    record = {
        "id": "MMBench-241",
        "image": ["241.png"],
        "voice": ["241.wav"],
        "category": ["identity_reasoning"],
        "answer": ["B"],
        "conversations": turns("Options:\nA.a cat\nB.a dog\nAnswer the question using a single word or phrase."),
    }
    write(root / "MMBench_audio.json", [record])
    return root


def race_audio(root: Path) -> Path:
    (root / "audio").mkdir(parents=True)
    for level, name in (("middle", "m1"), ("high", "h1")):
        (root / "audio" / f"{name}.wav").write_bytes(wav(2, 1.5))
        records = [
            {
                "id": f"{name}-{i}",
                "voice": [f"audio/{name}.wav"],
                "gt": gt,
                "conversations": turns(
                    "<audio>\nListen to the article and answer the question: Where is it?\nA. At home\nB. At school\n"
                    "C. In the street\nD. In a shop"
                ),
            }
            for i, gt in enumerate(["B", "In a shop"])
        ]
        write(root / f"race_{level}.json", records)
    return root


def ehsl(root: Path) -> Path:
    (root / "audio").mkdir(parents=True)
    (root / "audio" / "1.wav").write_bytes(wav(3, 1.0))
    text = "<audio>\nWhat will the woman do?\nA. Go home.\nB. Wait.\nC. Call."
    records = [
        {"id": i, "voice": ["/audio/1.wav"], "answer": "C", "category": kind, "conversations": turns(text)}
        for i, kind in enumerate(["long", "short"])
    ]
    write(root / "high_exam.json", records)
    return root


def clotho_aqa(root: Path) -> Path:
    (root / "audio_files").mkdir(parents=True)
    rows = []
    for name, question, answers in (
        ("rain 1.wav", "Is it raining?", ["yes", "yes", "no"]),
        ("rain 1.wav", "What is heard?", ["rain", "water", "drops"]),
    ):
        (root / "audio_files" / name).write_bytes(wav(4, 1.0))
        rows += [[name, question, answer, "yes"] for answer in answers]
    table(root / "clotho_aqa_test.csv", ["file_name", "QuestionText", "answer", "confidence"], rows)
    return root


CAPTIONS = {
    "Rain.wav": ["Rain falls hard on a tin roof.", "Heavy rain hits a metal roof", "It is raining on a roof"]
    + ["Rain is pouring down, steadily", "water pours onto metal"],
    "Bird.wav": ["A bird sings in a tree.", "Birds are chirping while wind blows", "A bird is chirping loudly"]
    + ["a small bird sings again and again", "Chirping of a bird outdoors"],
}


def clotho(root: Path) -> Path:
    (root / "evaluation").mkdir(parents=True)
    for number, name in enumerate(CAPTIONS):
        (root / "evaluation" / name).write_bytes(wav(10 + number, 1.0))
    header = ["file_name", *(f"caption_{n}" for n in range(1, 6))]
    table(root / "clotho_captions_evaluation.csv", header, [[name, *said] for name, said in CAPTIONS.items()])
    return root


def activitynet(root: Path) -> Path:
    (root / "Test_Videos").mkdir(parents=True)
    (root / "Test_Videos" / "v_1QIUV7WYKXg.mp4").write_bytes(mp4(1, 4))
    asked = [
        {"video_name": "1QIUV7WYKXg", "question": q, "question_id": f"v_1QIUV7WYKXg_{i}"}
        for i, q in ((3, "is the athlete wearing trousers"), (4, "what sport is it"))
    ]
    said = [
        {"answer": answer, "type": kind, "question_id": f"v_1QIUV7WYKXg_{i}"}
        for i, answer, kind in ((4, "long jump", 7), (3, "yes", 3))
    ]
    write(root / "test_q.json", asked)
    write(root / "test_a.json", said)
    return root


def msvd(root: Path) -> Path:
    (root / "YouTubeClips").mkdir(parents=True)
    (root / "YouTubeClips" / "-4wsuPCjDBc_5_15.avi").write_bytes(mp4(2, 4))
    (root / "youtube_mapping.txt").write_text("-4wsuPCjDBc_5_15 vid1\n-7KMZQEsJW4_205_208 vid2\n")
    entry = {"answer": "squirrel", "id": 30933, "question": "what is eating a peanut?", "video_id": 1}
    write(root / "test_qa.json", [entry])
    return root


MAKE: dict[str, Callable[[Path], Path]] = {
    "a-okvqa": aokvqa,
    "ok-vqa": lambda root: coco_vqa(root, ""),
    "vqav2": coco_vqa,
    "textvqa": textvqa,
    "pope": pope,
    "mm-vet": mm_vet,
    "mmbench": mmbench,
    "seed": seed,
    "mmbench-audio": mmbench_audio,
    "race-audio": race_audio,
    "ehsl": ehsl,
    "clotho-aqa": clotho_aqa,
    "clotho": clotho,
    "activitynet-qa": activitynet,
    "msvd-qa": msvd,
}


def turns(question: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": ""}]


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def table(path: Path, header: list[str], rows: list[list[str]]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
