"""The trained mini model over HTTP: the answers of ``unimoe eval`` on the same held-out items."""

from __future__ import annotations

import json
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.serving.conftest import ROOT, Endpoint, serve_run
from tests.serving.media import image, sound, text, video
from unimoe_ray import config
from unimoe_ray.mini import source as mini

RUN = ROOT / "runs" / "mini"
ITEMS = 200


def content_of(record: dict, folder: Path) -> list[dict]:
    make = {"image": image, "video": video, "audio": sound, "speech": lambda data: sound(data, "speech")}
    parts = [make[kind]((folder / record[kind]).read_bytes()) for kind in make if kind in record]
    return [*parts, text(record["conversations"][0]["value"].split("\n")[-1])]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    not (RUN / "eval_samples.jsonl").is_file(), reason="no trained model in runs/mini: 'make demo' first"
)
def test_held_out_answers_are_those_of_the_evaluation(monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = config.load_run(RUN)
    folder = mini.suite(settings, print)
    records = {record["id"]: record for record in json.loads((folder / "test.json").read_text())}
    by_task = defaultdict(list)
    for line in (RUN / "eval_samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        by_task[sample["task"]].append(sample)
    each = -(-ITEMS // len(by_task))
    chosen = [sample for samples in by_task.values() for sample in samples[:each]][:ITEMS]
    assert len(chosen) == ITEMS

    def answer(endpoint: Endpoint, sample: dict) -> str:
        reply = endpoint.chat(content_of(records[sample["id"]], folder), max_completion_tokens=16)
        return reply.json()["choices"][0]["message"]["content"]

    with contextmanager(serve_run)(settings) as endpoint, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda sample: answer(endpoint, sample), chosen))
    right = sum(given == sample["expected"] for given, sample in zip(answers, chosen, strict=True))
    assert right == sum(sample["correct"] for sample in chosen)
    differ = [(s["id"], s["answer"], a) for a, s in zip(answers, chosen, strict=True) if a != s["answer"]]
    assert not differ
