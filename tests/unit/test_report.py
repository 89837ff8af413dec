"""The report of a run folder with real media, of an unfinished run, and of hostile or damaged files."""

from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from PIL import Image, ImageDraw

from unimoe_ray.errors import UnimoeError
from unimoe_ray.report import write_report
from unimoe_ray.report.answers import pick
from unimoe_ray.report.plots import condense, linear_ticks, log_ticks, smoothed, wilson
from unimoe_ray.report.read import Curve

RUNS = {
    "base": ("base", 360, 6.2, 0.35, 2600),
    "align": ("align", 220, 3.9, 0.6, 4100),
    "experts/image": ("experts", 140, 1.4, 0.22, 5200),
    "experts/speech": ("experts", 110, 1.2, 0.12, 4700),
    "experts/audio": ("experts", 110, 0.9, 0.03, 4900),
    "tune": ("tune", 180, 0.8, 0.09, 3300),
}
TASKS = {
    "image_vqa": (0.867, 0.10, 300),
    "sound_event": (1.0, 0.06, 180),
    "spoken_word": (0.994, 0.05, 180),
    "spoken_question": (0.93, 0.14, 200),
    "video_direction": (0.973, 0.26, 150),
    "video_object": (0.72, 0.18, 150),
    "video_sound": (0.96, 0.12, 150),
    "text": (0.987, 0.11, 150),
    "real_digits": (0.967, 0.10, 30),
    "fashion": (0.81, 0.10, 200),
}
SPLIT = {
    "text": ("text",),
    "image_vqa": ("image",),
    "fashion": ("image",),
    "spoken_question": ("image", "speech"),
    "sound_event": ("audio",),
    "spoken_word": ("speech",),
    "real_digits": ("speech",),
    "video_direction": ("video",),
    "video_object": ("video",),
    "video_sound": ("video", "audio"),
}


def make_png(path: Path, seed: int) -> None:
    chooser = random.Random(seed)
    image = Image.new("RGB", (64, 64), (235, 235, 230))
    draw = ImageDraw.Draw(image)
    x, y, side = chooser.randint(5, 25), chooser.randint(5, 25), chooser.randint(20, 34)
    shape = chooser.choice((draw.ellipse, draw.rectangle))
    shape((x, y, x + side, y + side), fill=tuple(chooser.randint(0, 220) for _ in range(3)))
    image.save(path)


def make_wav(path: Path, pitch: float) -> None:
    time = np.arange(16000) / 16000
    soundfile.write(path, (0.3 * np.sin(2 * math.pi * pitch * time) * np.exp(-2 * time)).astype(np.float32), 16000)


def make_mp4(path: Path, sound: bool) -> None:
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=4)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        track = container.add_stream("aac", rate=16000, layout="mono") if sound else None
        for number in range(8):
            picture = Image.new("RGB", (64, 64), (20, 22, 40))
            ImageDraw.Draw(picture).ellipse((4 + 5 * number, 20, 24 + 5 * number, 40), fill=(240, 170, 40))
            container.mux(video.encode(av.VideoFrame.from_image(picture)))
        container.mux(video.encode(None))
        if track is not None:
            wave = 0.2 * np.sin(np.arange(32000) * 0.2)
            frame = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(track.encode(frame))
            container.mux(track.encode(None))


def make_metrics(run: Path) -> None:
    chooser, now = random.Random(0), 1_790_000_000.0
    with open(run / "metrics.jsonl", "w") as file:
        for name, (stage, steps, first, last, rate) in RUNS.items():
            for step in range(1, steps + 1):
                loss = last + (first - last) * math.exp(-5 * step / steps) + abs(chooser.gauss(0, 0.06 * first))
                tokens = chooser.randint(1500, 3200)
                now += tokens / rate
                line = {"step": step, "steps": steps, "stage": stage, "run": name, "loss": loss, "lr": 1e-3}
                line |= {"tokens": tokens, "tokens_per_s": rate, "samples": 48, "modality": {"text": tokens}}
                line |= {"expert_load": None, "world": 2, "time": now, "seconds": tokens / rate}
                file.write(json.dumps(line) + "\n")


def make_evaluation(run: Path, media: Path) -> None:
    chooser = random.Random(1)
    tasks = {name: {"accuracy": a, "majority": m, "n": n} for name, (a, m, n) in TASKS.items()}
    towers = {"image": "pretrained", "speech": "pretrained", "audio": "pretrained"}
    stamp = {"towers": towers, "suite": "3f9a1c0d" * 8, "seed": 0, "seconds": 742.4}
    stamp["parameters"] = {"total": 15_800_000, "active": 9_700_000}
    (run / "eval.json").write_text(json.dumps({"tasks": tasks} | stamp))
    experts, load = ["base", "image", "speech", "audio"], {}
    for kind in ("text", "image", "video", "speech", "audio", "answer"):
        favourite = experts.index({"video": "image"}.get(kind, kind)) if kind not in ("text", "answer") else 0
        load[kind] = []
        for _ in range(4):
            weights = [chooser.random() + (2.4 if e == favourite else 0.25) for e in range(4)]
            load[kind].append([round(w / sum(weights), 4) for w in weights])
    (run / "routing.json").write_text(json.dumps({"experts": experts, "layers": 4, "load": load}))
    with open(run / "eval_samples.jsonl", "w") as file:
        for task, (accuracy, _, n) in TASKS.items():
            for number in range(n):
                files = []
                for kind in SPLIT[task]:
                    name = {"image": "i{}.png", "speech": "s{}.wav", "audio": "a{}.wav", "video": "v{}.mp4"}.get(kind)
                    if task == "video_sound":
                        files.append({"kind": kind, "path": str(media / "v1.mp4")})
                    elif name:
                        files.append({"kind": kind, "path": str(media / name.format(number % 2))})
                correct = number < round(accuracy * n)
                question = "" if task == "spoken_word" else "what shape is in the image?"
                record = {"id": f"{task}-{number}", "task": task, "question": question, "media": files}
                answer = "circle" if correct else "rectangle"
                file.write(json.dumps(record | {"answer": answer, "expected": "circle", "correct": correct}) + "\n")


def make_run(root: Path) -> Path:
    """A finished run like the embedded default's, with media in root/suite."""
    run, media = root / "runs" / "mini", root / "suite"
    run.mkdir(parents=True)
    media.mkdir()
    for number in range(2):
        make_png(media / f"i{number}.png", number)
        make_wav(media / f"s{number}.wav", 220.0 + number)
        make_wav(media / f"a{number}.wav", 440.0 + number)
        make_mp4(media / f"v{number}.mp4", sound=number == 1)
    (run / "config.yaml").write_text("name: mini\nseed: 0\n")
    make_metrics(run)
    make_evaluation(run, media)
    reasons = ["placeholders: 1 <image>, files: 0", "broken image", "broken image"]
    (run / "quarantine.jsonl").write_text(
        "".join(json.dumps({"id": str(i), "reason": r}) + "\n" for i, r in enumerate(reasons))
    )
    return run


class _Page(HTMLParser):
    """Elements with their attributes; fails on tags that do not match."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in ("meta", "img", "input", "br"):
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.elements.append((name, dict(attributes)))

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def all(self, name: str, key: str) -> list[str]:
        return [attributes[key] for tag, attributes in self.elements if tag == name and key in attributes]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    run = make_run(tmp_path_factory.mktemp("finished"))
    page = write_report(run)
    assert page == run / "report" / "index.html"
    return run, page.read_text(encoding="utf-8")


def test_everything_that_the_page_refers_to_is_there_and_local(finished) -> None:
    run, text = finished
    page = _Page(text)
    sources = [s for name in ("img", "video", "audio") for s in page.all(name, "src")]
    assert len(sources) >= 9 * 4
    for source in sources:
        assert source.startswith("media/") and (run / "report" / source).is_file()
    for link in page.all("a", "href"):
        assert (run / "report" / link).exists() if not link.startswith("#") else f'id="{link[1:]}"' in text
    assert "http" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.S)
    assert {p.name for p in (run / "report" / "media").iterdir()} == {
        s.removeprefix("media/") for s in sources + page.all("video", "poster")
    }


def test_numbers_of_the_page_are_those_of_the_run(finished) -> None:
    _, text = finished
    plain = re.sub(r"\s+", " ", re.sub(r"<(style|script|svg).*?</\1>|<[^>]+>", " ", text, flags=re.S))
    low, high = wilson(0.867, 300)
    assert f"image_vqa 86.7 % {100 * low:.1f} – {100 * high:.1f} 10.0 % 300" in plain
    assert "12 min 22 s" in plain and "15.8 M" in plain and "9.7 M active" in plain
    mean = sum(a for a, _, _ in TASKS.values()) / len(TASKS)
    assert f"{100 * mean:.1f} %" in plain
    assert re.search(r"experts experts/image 140 ", plain)
    assert "3 records in quarantine" in plain and "broken image 2" in plain
    for kind in ("image", "video", "speech", "audio", "answer"):
        assert f"{kind} layer base image speech audio 1 " in plain
    assert "260 of 300 right" in plain


def test_there_is_a_chart_per_run_on_both_scales(finished) -> None:
    _, text = finished
    assert text.count('<figure class="chart') == len(RUNS)
    assert text.count('class="scale-linear"') == text.count('class="scale-log"') == len(RUNS)
    assert "nan" not in re.findall(r' d="[^"]*"', text)
    points = [json.loads(p) for p in _Page(text).all("figure", "data-points")]
    assert [len(p) for p in points] == [steps for _, steps, _, _, _ in RUNS.values()]


def test_videos_are_made_playable_and_keep_their_sound(finished) -> None:
    run, _ = finished
    tracks = set()
    for path in (run / "report" / "media").glob("*.mp4"):
        with av.open(str(path)) as container:
            assert container.streams.video[0].codec_context.name == "h264"
            assert sum(1 for _ in container.decode(video=0)) == 8
            tracks.add(len(container.streams.audio))
    assert tracks == {0, 1}


def test_a_second_report_replaces_the_first(finished) -> None:
    run, text = finished
    (run / "report" / "media" / "stale.png").write_bytes(b"x")
    again = write_report(run).read_text(encoding="utf-8")
    undated = re.compile(r"on \d+ \w+ \d{4}, \d\d:\d\d")
    assert undated.sub("", again) == undated.sub("", text)
    assert not (run / "report" / "media" / "stale.png").exists()


def test_text_of_the_run_is_escaped(tmp_path) -> None:
    evil = '<script>alert("x")</script>'
    run = tmp_path / "run"
    run.mkdir()
    sample = {"id": evil, "task": evil, "question": evil, "answer": evil, "expected": evil, "correct": False}
    sample["media"] = [{"kind": evil, "path": f"{evil}.png"}]
    (run / "eval_samples.jsonl").write_text(json.dumps(sample) + "\n")
    scores = {evil: {"accuracy": 0.5, "majority": 0.1, "n": 4}}
    (run / "eval.json").write_text(json.dumps({"tasks": scores, "towers": {evil: evil}, "suite": evil, "seed": evil}))
    (run / "routing.json").write_text(json.dumps({"experts": [evil], "load": {evil: [[1.0]]}}))
    line = {"step": 1, "run": evil, "stage": evil, "loss": 1.0, "validation": {evil: 1.0, "b": 2.0}}
    line |= {"expert_tokens": {evil: [[3, 4]]}, "router_entropy": [0.5], "busiest_share": [0.6]}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    finding = {"run": evil, "step": 1, "since": 1, "signature": evil, "text": evil}
    (run / "findings.jsonl").write_text(json.dumps(finding) + "\n")
    (run / "config.yaml").write_text(json.dumps({"model": {"moe": {"slots": [evil, evil]}}}))
    (run / "quarantine.jsonl").write_text(json.dumps({"reason": evil}) + "\n")
    text = write_report(run).read_text()
    assert "<script>alert" not in text
    assert text.count("&lt;script&gt;alert") > 10
    _Page(text)
    assert "random weights" in text


def test_an_unfinished_run_says_what_is_missing(tmp_path) -> None:
    run = tmp_path / "new"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 7\n")
    text = write_report(run).read_text()
    assert "No evaluation yet" in text and "No training steps yet" in text and "No routing report" in text
    assert "<code" in text and ">7<" in text
    _Page(text)


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "run": "base", "loss": 2.5}\nbroken\n{"loss": 1}\n{"step": 2, "ru')
    (run / "eval.json").write_text('{"tasks": {"a": {"accuracy": 7, "majority": 0, "n": 3}}}')
    (run / "routing.json").write_text("{")
    text = write_report(run).read_text()
    assert "metrics.jsonl: 1 damaged line was left out" in text and "without a step" in text
    assert "eval.json is damaged" in text and "routing.json is damaged" in text
    assert text.count("<figure") == 1


def test_no_run_folder_is_one_clear_line(tmp_path) -> None:
    with pytest.raises(UnimoeError, match="no such run folder") as error:
        write_report(tmp_path / "nothing")
    assert "\n" not in str(error.value) and str(tmp_path / "nothing") in str(error.value)
    (tmp_path / "other").mkdir()
    with pytest.raises(UnimoeError, match="not a run folder"):
        write_report(tmp_path / "other")


def test_a_report_that_cannot_be_written_is_one_clear_line(tmp_path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "report").write_text("a file where the folder should be")
    with pytest.raises(UnimoeError, match="report"):
        write_report(tmp_path)


def test_steps_done_again_after_a_stop_count_once() -> None:
    curve = Curve("base", "base")
    for step, loss in ((1, 9.0), (2, 8.0), (3, 7.0), (2, 6.0), (3, 5.0)):
        curve.add({"step": step, "steps": 10, "loss": loss, "tokens": 100, "tokens_per_s": 50})
    assert curve.steps == [1, 2, 3] and curve.losses == [9.0, 6.0, 5.0]
    assert sum(curve.seconds) == 6.0 and curve.planned == 10


def test_wilson_interval_is_the_textbooks() -> None:
    # Newcombe 1998, table I, method 3: 81/263, 15/148, 0/20.
    for k, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson(k / n, n) == pytest.approx((low, high), abs=5e-5)


def test_heat_maps_come_in_one_order_and_share_one_scale(tmp_path) -> None:
    load = {"zebra": [[0.3, 0.7]], "speech": [[0.8, 0.2]], "text": [[0.5, 0.5]]}
    (tmp_path / "routing.json").write_text(json.dumps({"experts": ["base"], "layers": 1, "load": load}))
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    text = write_report(tmp_path).read_text()
    assert re.findall(r'<figure class="map[^>]*>.*?<strong>(\w+)', text) == ["text", "speech", "zebra"]
    assert re.findall(r"--depth:([\d.]+)%", text) == ["50.0", "50.0", "80.0", "20.0", "30.0", "70.0"]
    assert "expert 1" in text


def test_long_runs_are_condensed_without_losing_extremes() -> None:
    losses = [2.0] * 10_000
    losses[4321], losses[17] = 50.0, float("nan")
    steps, low, mean, high = condense(list(range(1, 10_001)), losses, 500)
    assert len(steps) == 500 and steps[0] >= 1 and steps[-1] == 10_000
    assert high.max() == 50.0 and low.min() == 2.0 and np.isfinite(mean).all()
    assert smoothed(np.full(100, 3.0)) == pytest.approx(3.0)
    ramp = np.arange(100.0)
    assert smoothed(ramp)[20:80] == pytest.approx(ramp[20:80])


def test_ticks_are_round_and_inside() -> None:
    assert linear_ticks(0.0, 6.2) == [0, 2, 4, 6]
    assert linear_ticks(1, 3, whole=True) == [1, 2, 3]
    assert log_ticks(0.08, 12.0) == [0.1, 0.2, 0.5, 1, 2, 5, 10]
    assert all(0.51 < tick < 0.56 for tick in log_ticks(0.51, 0.56))
    assert len(log_ticks(1e-9, 1e9)) <= 7


def test_sample_answers_show_right_and_wrong_ones() -> None:
    samples = [{"id": i, "correct": i % 10 != 0} for i in range(100)]
    assert [s["correct"] for s in pick(samples, 4)] == [True, True, False, False]
    assert len({s["id"] for s in pick(samples, 4)}) == 4
    assert [s["correct"] for s in pick(samples[1:10], 4)] == [True] * 4
    assert [s["correct"] for s in pick([{"correct": False}] * 3, 4)] == [False] * 3
