"""The small task suite, built from the real assets at its tiny scale."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import wave
from collections import defaultdict
from pathlib import Path

import av
import numpy as np
import pytest

from unimoe_ray.data.media import load_audio, load_video
from unimoe_ray.data.schema import Sample, parse_record
from unimoe_ray.errors import UnimoeError, UsageError
from unimoe_ray.mini import assets as mini_assets
from unimoe_ray.mini import suite
from unimoe_ray.mini.espeak import Utterance, speaking
from unimoe_ray.mini.example import stream
from unimoe_ray.mini.image_tasks import split_pictures
from unimoe_ray.mini.questions import describe
from unimoe_ray.mini.render import DIRECTIONS, cut_out, move, write_mp4
from unimoe_ray.mini.sound_tasks import EVENTS, event_wave
from unimoe_ray.mini.soundfont import SoundFont
from unimoe_ray.mini.speech_tasks import split_voices
from unimoe_ray.mini.text_task import text_examples
from unimoe_ray.mini.verbalise import FILLER, words_examples

EVALUATED = {
    *("image_vqa", "sound_event", "spoken_word", "spoken_question"),
    *("video_direction", "video_object", "video_sound", "text"),
}


@pytest.fixture(scope="module")
def assets():
    try:
        return mini_assets.fetch(debian_packages=False)
    except UnimoeError as error:
        pytest.skip(f"the mini assets can't be had: {error}")


@pytest.fixture(scope="module")
def built(assets, tmp_path_factory):
    """(folder, what build returned, {split: samples})"""
    folder = tmp_path_factory.mktemp("suite") / "mini"
    summary = suite.build(folder, assets, 3, suite.SuiteScale.tiny())
    return folder, summary, {split: _read(folder, split) for split in ("train", "dev", "test")}


def _read(folder: Path, split: str) -> list[Sample]:
    return [parse_record(record, n) for n, record in enumerate(json.loads((folder / f"{split}.json").read_text()))]


def _files(samples: list[Sample]) -> set[str]:
    return {path for sample in samples for media in sample.media for path in media.paths}


def test_same_bytes_in_another_process(built, assets, tmp_path):
    folder, summary, _ = built
    program = f"""
import sys
from pathlib import Path
from unimoe_ray.mini import assets, suite
found = assets.fetch(debian_packages=False)
suite.build(Path({str(tmp_path / "again")!r}), found, int(sys.argv[1]), suite.SuiteScale.tiny())
"""
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program, "3"], check=True, env=environment, timeout=120)
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert names == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    different = [
        str(name) for name in names if (folder / name).read_bytes() != (tmp_path / "again" / name).read_bytes()
    ]
    assert different == []
    assert suite.content_hash(tmp_path / "again") == summary["hash"]


def test_another_seed_gives_another_suite(built, assets, tmp_path):
    _, summary, _ = built
    assert suite.build(tmp_path / "other", assets, 4, suite.SuiteScale.tiny())["hash"] != summary["hash"]


def test_hash_depends_on_names_and_bytes(tmp_path):
    (tmp_path / "a").write_text("x")
    first = suite.content_hash(tmp_path)
    (tmp_path / "suite.json").write_text("{}")
    assert suite.content_hash(tmp_path) == first
    (tmp_path / "a").write_text("y")
    second = suite.content_hash(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, suite.content_hash(tmp_path)}) == 3


def test_summary_counts_what_was_written(built):
    folder, summary, samples = built
    assert json.loads((folder / "suite.json").read_text()) == json.loads(json.dumps(summary))
    for split, items in samples.items():
        counts = defaultdict(int)
        for sample in items:
            counts[sample.task] += 1
        assert summary["counts"][split] == counts
    for split in ("dev", "test"):
        assert not EVALUATED - set(summary["counts"][split])
    assert summary["answers"]["sound_event"] == 12
    assert summary["counts"]["train"]["words_image_vqa"] > 0.35 * sum(
        count for task, count in summary["counts"]["train"].items() if task.startswith("words_")
    )


def test_records_are_valid_and_plain(built):
    folder, _, samples = built
    for items in samples.values():
        assert len({sample.id for sample in items}) == len(items)
        for sample in items:
            for question, answer in sample.turns:
                text = re.sub(r"<\w+>\n", "", question) if sample.media else question.replace("\n", " ")
                if sample.id.split("-")[1] == "train":
                    # Only training questions are reworded.
                    text = text.lower().removesuffix("?")
                for part in (text, answer):
                    assert re.fullmatch(r"[a-z0-9-]+( [a-z0-9-]+)*", part), (sample.id, part)
            assert not (sample.task.startswith(("words_", "text")) and sample.media)
    written = {path.relative_to(folder).as_posix() for path in (folder / "media").rglob("*") if path.is_file()}
    assert written == set().union(*(_files(items) for items in samples.values()))


def test_many_image_conversations_have_several_rounds(built):
    rounds = [len(sample.turns) for sample in built[2]["train"] if sample.task == "image_vqa"]
    assert sum(rounds) > 220
    assert 0.3 < np.mean(np.array(rounds) > 1) < 0.7
    assert set(rounds) == {1, 2, 3}


def test_no_file_of_one_split_occurs_in_another(built):
    folder, _, samples = built
    contents = {split: {(folder / path).read_bytes() for path in _files(items)} for split, items in samples.items()}
    assert not contents["train"] & contents["test"]
    assert not contents["train"] & contents["dev"]
    assert not contents["dev"] & contents["test"]


def test_pictures_and_voices_are_split(assets):
    pictures = split_pictures(assets.path("easy_vqa"), 10_000)
    assert {split: len(items) for split, items in pictures.items()} == {"train": 3700, "dev": 300, "test": 1000}
    assert not {p.path for p in pictures["train"]} & {p.path for p in pictures["dev"]}
    voices = split_voices()
    assert {split: len(names) for split, names in voices.items()} == {"train": 44, "dev": 6, "test": 12}
    assert len(set().union(*voices.values())) == 62


def test_voices_of_clips_follow_the_split(built):
    voices = split_voices()
    for split, samples in built[2].items():
        clips = {
            Path(path).stem for path in _files(samples) if path.startswith("media/speech/") and "human" not in path
        }
        assert clips
        assert {clip.rsplit("_", 2)[1] for clip in clips} <= set(voices[split])


def test_pitches_are_split(assets, monkeypatch, tmp_path):
    played = defaultdict(set)
    note = SoundFont.note

    def recorded(self, program, key, velocity, seconds):
        played[split].add((program, key, velocity))
        return note(self, program, key, velocity, seconds)

    monkeypatch.setattr(SoundFont, "note", recorded)
    font = SoundFont(assets.path("timgm6mb") / "TimGM6mb.sf2")
    for split in ("train", "dev", "test"):
        for number in range(60):
            event_wave(font, list(EVENTS)[number % 12], split, stream(0, split, number), 4000)
    assert all(key % 3 for _, key, _ in played["train"] | played["dev"])
    assert not any(key % 3 for _, key, _ in played["test"])
    assert not played["train"] & played["dev"]


def test_text_questions_are_split():
    questions = {
        split: {example.turns[0] for example in text_examples(0, split, 300)} for split in ("train", "dev", "test")
    }
    assert not questions["train"] & questions["test"]
    assert not questions["train"] & questions["dev"]
    for question, answer in questions["test"]:
        words = question.split()
        if "larger" in words:
            assert int(answer) == max(int(words[-3]), int(words[-1]))
        else:
            assert answer in (words[-3], words[-1])


def test_answers_of_test_occur_in_training(built):
    """At this scale not for the two tasks with tens of combinations."""
    known = defaultdict(set)
    for sample in built[2]["train"]:
        known[sample.task].update(answer for _, answer in sample.turns)
    known["real_digits"] = known["spoken_word"]
    for sample in built[2]["test"]:
        if sample.task not in ("video_object", "video_sound"):
            assert sample.turns[-1][1] in known[sample.task], sample.id


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([("what color is the circle", "red")], ("red", "circle")),
        ([("what is the blue shape", "triangle")], ("blue", "triangle")),
        ([("is there not a red shape", "no"), ("is a circle present", "yes")], ("red", "circle")),
        ([("is no circle present", "yes"), ("is there a triangle", "no")], (None, "rectangle")),
        ([("does the image not contain a teal shape", "yes")], (None, None)),
    ],
)
def test_what_questions_tell_about_a_picture(turns, expected):
    assert describe(turns) == expected


def test_descriptions_agree_with_the_pictures(assets):
    """The colour of the object's pixels, against the colour that the questions tell."""
    rgb = {"red": (255, 0, 0), "blue": (0, 0, 255), "black": (0, 0, 0), "yellow": (255, 255, 0)}
    pictures = [p for p in split_pictures(assets.path("easy_vqa"), 200)["train"] if p.content and p.content[0] in rgb]
    assert len(pictures) > 50
    for picture in pictures:
        sprite, _ = cut_out(picture.path)
        centre = np.asarray(sprite)[sprite.height // 2, sprite.width // 2].astype(int)
        assert np.abs(centre - rgb[picture.content[0]]).max() < 30, picture


def test_wav_files_are_16_bit_mono_16_khz(built):
    folder, _, samples = built
    seconds = defaultdict(list)
    for split in samples:
        for path in _files(samples[split]):
            if path.endswith(".wav"):
                with wave.open(str(folder / path)) as file:
                    assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16_000)
                    seconds[path.split("/")[1]].append(file.getnframes() / 16_000)
                assert np.abs(load_audio(folder / path)).max() > 0.1, path
    assert set(seconds["sound"]) == {1.5}
    assert min(seconds["speech"]) > 0.3
    assert max(seconds["speech"]) <= 1.92


def test_videos_decode_to_what_was_drawn(assets, tmp_path):
    """Frames within a few levels of the drawn ones; a sound track of the clip's length, not shifted."""
    picture = split_pictures(assets.path("easy_vqa"), 1)["train"][0]
    sound = 0.5 * np.sin(np.arange(31 * 1024) * 0.2 + np.arange(31 * 1024) ** 2 * 1e-6).astype(np.float32)
    for direction, (dx, dy) in DIRECTIONS.items():
        frames = move(*cut_out(picture.path), direction, stream(0, direction))
        write_mp4(tmp_path / "clip.mp4", frames, sound)
        with av.open(str(tmp_path / "clip.mp4")) as container:
            assert sum(1 for _ in container.decode(video=0)) == 8
            assert container.duration / av.time_base == pytest.approx(2.0, abs=0.01)
        decoded = load_video(tmp_path / "clip.mp4", 8)
        for drawn, seen in zip(frames, decoded, strict=True):
            assert np.abs(np.asarray(drawn, float) - np.asarray(seen, float)).mean() < 4
        centres = [_centre(image) for image in decoded]
        moved = np.subtract(centres[-1], centres[0])
        assert np.sign(np.round(moved / 10)).tolist() == [dx, dy]
        heard = load_audio(tmp_path / "clip.mp4")
        assert len(heard) == pytest.approx(2.0 * 16_000, abs=1024)
        assert np.corrcoef(heard[2000:30_000], sound[2000:30_000])[0, 1] > 0.99


def _centre(image) -> tuple[float, float]:
    pixels = np.asarray(image, float)
    rows, columns = np.nonzero(np.abs(pixels - np.median(pixels, axis=(0, 1))).sum(axis=2) > 150)
    return columns.mean(), rows.mean()


def test_words_of_media_stand_before_the_question(built):
    for sample in built[2]["train"]:
        if not sample.task.startswith("words_") or sample.task == "words_text":
            continue
        (question, answer), *_ = sample.turns
        *blocks, _ = question.split("\n")
        told = set(" ".join(blocks).split()) - {FILLER}
        if sample.task not in ("words_image_vqa", "words_spoken_question"):
            assert set(answer.split()) - {"a", "an", "the", "of", "sound", "photo", "moves"} <= told, sample
        if sample.task == "words_spoken_question":
            assert answer in blocks[0].split()
            assert re.search("what .*(shape|color)", blocks[1])


def test_words_examples_are_fresh_draws():
    examples = text_examples(0, "train", 40)
    words = words_examples(0, "train", examples, 100, 5)
    assert len(words) == 100
    assert {example.turns for example in words} == {example.turns for example in examples}


def test_a_folder_of_something_else_is_left_alone(tmp_path, assets):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="is no suite"):
        suite.build(tmp_path, assets, 0, suite.SuiteScale.tiny())
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_failing_speech_is_one_clear_line_and_leaves_nothing(assets, tmp_path):
    class Broken:
        def path(self, name):
            return tmp_path / "nowhere" if name == "espeak" else assets.path(name)

        def optional(self, name):
            return None

    with pytest.raises(UnimoeError, match="nowhere: no libespeak-ng") as caught:
        suite.build(tmp_path / "suites" / "mini", Broken(), 0, suite.SuiteScale.tiny())
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "suites").iterdir()) == []


def test_unknown_voice_is_named(assets, tmp_path):
    item = Utterance(str(tmp_path / "a.wav"), "hello", "en-us+nobody-at-all", 150, 50, 0.5, 0.1, 0.1)
    speech = speaking(assets.path("espeak"), [item._replace(voice="no-such-language")], 2.0)
    with pytest.raises(UnimoeError, match="no-such-language"), speech:
        pass


def test_not_a_sound_font(tmp_path):
    (tmp_path / "a.sf2").write_bytes(b"RIFF\xff\xff\xff\x7fsfbk")
    with pytest.raises(UnimoeError, match="not a SoundFont"):
        SoundFont(tmp_path / "a.sf2")
