"""A benchmark's questions over Ray workers: interrupted and taken up again, with broken media, by several models."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray

from tests.benchmark_files import MAKE, coco_vqa
from tests.tiny import make_servable_run
from unimoe_ray.errors import UnimoeError
from unimoe_ray.evaluation import benchmark as running
from unimoe_ray.evaluation.answering import Answerer
from unimoe_ray.evaluation.benchmark import Task, ray_workers, run_benchmark
from unimoe_ray.evaluation.benchmarks import Decoding, find_benchmark, open_folder
from unimoe_ray.evaluation.evaluate import final_model

FILES = ("samples.jsonl", "result.json", "unusable.jsonl")


class Stopped(Exception):
    """Instead of a signal in the middle."""


@pytest.fixture
def config(tmp_path):
    return make_servable_run(tmp_path, model={"language": {"max_positions": 128}}).config


def task(name: str, folder: Path, **changes) -> Task:
    benchmark, split = find_benchmark(name)
    decoding = changes.pop("decoding", Decoding(6))
    return Task(benchmark, open_folder(benchmark, folder), split, decoding, **changes)


def run(config, what: Task, on_progress=None):
    """With the real model, but in this process."""

    def ask(questions, count):
        answerer = Answerer(config.model_dump(mode="json"), str(final_model(config)), what.decoding, False)
        for question in questions:
            yield question, answerer.answer([question])[0]

    return run_benchmark(config, final_model(config), what, ask, on_progress)


def contents(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in FILES}


@pytest.mark.parametrize("name", ["vqav2", "clotho-aqa"])
def test_what_was_interrupted_goes_on_and_ends_the_same(config, tmp_path, name):
    what = task(name, MAKE[name](tmp_path / name))
    whole = run(config, what)
    before = contents(whole.folder)
    assert whole.asked == whole.questions == len(before["samples.jsonl"].splitlines())
    log = whole.folder / "answers.jsonl"
    all_answers = log.read_text()
    shutil.rmtree(whole.folder)

    def stop(done: int, total: int) -> None:
        if done == 1:
            raise Stopped

    with pytest.raises(Stopped):
        run(config, what, stop)
    assert log.read_text() == all_answers.splitlines(keepends=True)[0]
    with open(log, "a") as file:
        file.write('{"id": "torn li')
    shown = []
    again = run(config, what, lambda *counts: shown.append(counts))
    assert again.asked == whole.questions - 1
    assert shown == [(done, whole.questions) for done in range(2, whole.questions + 1)]
    assert contents(again.folder) == before
    assert log.read_text() == all_answers
    assert run(config, what).asked == 0
    assert contents(again.folder) == before
    assert again.figures == whole.figures


def test_broken_media_are_named_and_asked_again_once_they_are_there(config, tmp_path):
    folder = coco_vqa(tmp_path / "vqav2")
    picture = folder / "val2014" / "COCO_val2014_000000000101.jpg"
    data = picture.read_bytes()
    picture.unlink()
    found = run(config, task("vqav2", folder))
    reason = f"{picture}: No such file or directory"
    assert found.unusable == [{"id": "101000", "reason": reason}, {"id": "101001", "reason": reason}]
    result = json.loads((found.folder / "result.json").read_text())
    assert (result["questions"], result["answered"], result["unusable"]) == (6, 4, 2)
    assert result["figures"][0]["n"] == 4
    submission = json.loads(found.submission[0].read_text())
    assert [entry["answer"] == "" for entry in submission] == [False, False, True, True, False, False]
    picture.write_bytes(data)
    found = run(config, task("vqav2", folder))
    assert (found.asked, found.unusable, found.figures[0]["n"]) == (2, [], 6)


def test_models_decodings_and_questions_do_not_mix(config, tmp_path):
    folder = MAKE["ok-vqa"](tmp_path / "ok-vqa")
    first = run(config, task("ok-vqa", folder, limit=2))
    assert (first.questions, first.asked) == (2, 2)
    assert run(config, task("ok-vqa", folder)).asked == 4
    longer = run(config, task("ok-vqa", folder, decoding=Decoding(3)))
    assert longer.asked == 6 and longer.folder != first.folder
    path = next(folder.glob("*questions*"))
    path.write_text(path.read_text().replace("part 1", "part one"))
    changed = run(config, task("ok-vqa", folder))
    assert (changed.folder, changed.asked) == (first.folder, 3)  # only questions that are others now
    other = make_servable_run(tmp_path / "other", model={"language": {"max_positions": 128}}, seed=1).config
    model = final_model(other) / "manifest.json"
    model.write_text(model.read_text().replace('"recipe": "', '"recipe": "x'))
    assert run(other, task("ok-vqa", folder)).folder.name != first.folder.name


@pytest.fixture(scope="module")
def cluster():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture
def shared(config, tmp_path, monkeypatch):
    """A task of 20 questions, asked one by one, how two workers ask it, and the files of one process alone."""
    monkeypatch.setattr(running, "CHUNK", 1)
    what = task("vqav2", coco_vqa(tmp_path / "vqav2", count=10))
    alone = run(config, what)
    before = contents(alone.folder)
    shutil.rmtree(alone.folder)
    return what, ray_workers(config, final_model(config), what.decoding, workers=2, use_gpu=False), before


def test_workers_share_the_questions(cluster, config, shared):
    what, ask, before = shared
    found = run_benchmark(config, final_model(config), what, ask)
    assert found.asked == 20 and contents(found.folder) == before


def answerers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "Answerer" in "".join(process.cmdline()[:1]):
                found.append(process)
    return found


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced(cluster, config, shared):
    what, ask, before = shared
    killed = []

    def kill_one(done: int, total: int) -> None:
        if done == 4:
            end = time.monotonic() + 120
            while len(actors := answerers()) < 2 and time.monotonic() < end:  # the other may still be starting
                time.sleep(0.05)
            actors[0].kill()
            killed.append(len(actors))

    found = run_benchmark(config, final_model(config), what, ask, kill_one)
    assert killed == [2] and found.asked == 20 and contents(found.folder) == before


@pytest.mark.slow
def test_a_model_of_other_towers_is_refused_in_one_line(cluster, config, tmp_path):
    path = final_model(config) / "config.json"
    manifest = path.with_name("manifest.json")
    info = json.loads(path.read_text())
    info["towers"]["image"] = "another"
    path.write_text(json.dumps(info))
    listed = json.loads(manifest.read_text())
    listed["files"]["config.json"] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(listed))
    what = task("pope", MAKE["pope"](tmp_path / "pope"))
    ask = ray_workers(config, final_model(config), what.decoding, workers=1, use_gpu=False)
    with pytest.raises(UnimoeError, match="was trained with another image tower") as error:
        run_benchmark(config, final_model(config), what, ask)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_killed_command_goes_on(config, tmp_path):
    """SIGKILL of ``unimoe eval`` while it answers; the second one asks what is missing and ends as one alone does."""
    folder = coco_vqa(tmp_path / "data", count=120)
    command = [sys.executable, "-m", "unimoe_ray.cli", "eval", str(config.run_dir), "--benchmark", "vqav2"]
    command += ["--data", str(folder), "--json"]
    whole = subprocess.run(command, capture_output=True, text=True, check=True)
    (out,) = (config.run_dir / "benchmarks" / "vqav2-val").iterdir()
    before = contents(out)
    assert json.loads(whole.stdout) == json.loads(before["result.json"])
    shutil.rmtree(out)
    victim = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    log = out / "answers.jsonl"
    while not (log.is_file() and log.stat().st_size):
        assert victim.poll() is None
        time.sleep(0.02)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    left = 240 - len(log.read_text().splitlines())
    assert 0 < left < 240
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"({left} asked now" in again.stderr or f"({left + 1} asked now" in again.stderr  # a torn line
    assert contents(out) == before
