"""Videos with free answers: ActivityNet-QA and MSVD-QA. The paper has a language model judge them; its file is written,
and the figures here are exact match and the reference's words within the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from unimoe_ray.data.schema import Media
from unimoe_ray.errors import UsageError
from unimoe_ray.evaluation.benchmarks import files, scores, submit
from unimoe_ray.evaluation.benchmarks.base import SAMPLED, Answered, Benchmark, Question
from unimoe_ray.evaluation.benchmarks.files import Entry, Folder

_ENDINGS = (".mp4", ".mkv", ".webm", ".avi")


def _question(name: str, video: str, asked: Entry, said: Entry, kind: str) -> Question:
    text = asked.text("question")
    return Question(
        name,
        f"<video>\n{text}",
        (Media("video", (video,)),),
        (said.text("answer"),),
        group=video,
        facts={"question": text, "type": kind},
    )


def _activitynet(folder: Folder, split: str) -> Iterator[Question]:
    find = _finder(folder, "Test_Videos", "all_test", "videos")
    asked = files.json_list(folder.one(f"{split}_q.json"))
    said = files.json_list(folder.one(f"{split}_a.json"))
    for question, answer in files.joined(asked, said, "question_id"):
        video = find(f"v_{question.text('video_name')}")
        yield _question(question.text("question_id"), video, question, answer, str(answer["type"]))


def _msvd(folder: Folder, split: str) -> Iterator[Question]:
    find = _finder(folder, "YouTubeClips", "videos")
    clips = _clips(folder.one("youtube_mapping.txt"))
    file = folder.one(f"{split}_qa.json")
    for entry in files.json_list(file):
        number = entry.number("video_id")
        if number not in clips:
            raise UsageError(f"{file}, {entry.where}: video vid{number} is not in youtube_mapping.txt")
        yield _question(str(entry.number("id")), find(clips[number]), entry, entry, entry.text("question").split()[0])


def _clips(file: Path) -> dict[int, str]:
    """Lines ``CLIP vidN``."""
    clips = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        clip, _, number = line.strip().rpartition(" ")
        if line.strip():
            if not clip or not number.startswith("vid") or not number[3:].isdigit():
                raise UsageError(f"{file}: '{line}' is not a clip and its vidN")
            clips[int(number[3:])] = clip
    return clips


def _finder(folder: Folder, *folders: str) -> Callable[[str], str]:
    """Names without ending to the video file that is there; ``.mp4`` for one that is not."""
    place = folder.media_in(*folders)
    return lambda name: next((p for e in _ENDINGS if Path(p := place(name + e)).is_file()), place(name + _ENDINGS[0]))


def _for_judge(a: Answered) -> dict[str, str]:
    """Of Video-ChatGPT's evaluation script."""
    facts = a.question.facts
    return {"id": a.question.id, "question": facts["question"], "answer": a.question.references[0], "pred": a.answer}


BENCHMARKS = (
    Benchmark(
        "activitynet-qa",
        "ActivityNet-QA",
        "SPLIT_q.json, SPLIT_a.json; videos v_NAME.mp4 in Test_Videos/",
        ("test", "val", "train"),
        SAMPLED,
        _activitynet,
        scores.free_score("type"),
        submit.json_of("for_judge.json", _for_judge),
    ),
    Benchmark(
        "msvd-qa",
        "MSVD-QA",
        "SPLIT_qa.json, youtube_mapping.txt; videos in YouTubeClips/",
        ("test", "val", "train"),
        SAMPLED,
        _msvd,
        scores.free_score("type"),
        submit.json_of("for_judge.json", _for_judge),
    ),
)
