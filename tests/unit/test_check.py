"""The check of a data set: what it counts, its page, and the command."""

import json
from collections import Counter

import numpy as np
import pytest
import soundfile
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.tiny import tiny_config
from unimoe_ray import cli
from unimoe_ray.config import dump
from unimoe_ray.config.data import SourceConfig
from unimoe_ray.data.check import check
from unimoe_ray.report.check import histogram, quantile, write_check_page


def record(name: str, question: str, **fields) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "yes"}]
    return {"id": name, "task": "look", "conversations": turns, **fields}


@pytest.fixture
def folder(tmp_path):
    for name, seed in (("a.png", 0), ("b.png", 1), ("copy of a.png", 0)):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    soundfile.write(tmp_path / "s.wav", np.full(16_000, 0.1), 16_000)
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:900])
    train = [
        record("one", "<image> <b>x</b>?", image="a.png"),
        record("two", "<image> y?", image="b.png"),
        record("three", "<speech>", speech="s.wav"),
        record("same as one", "<image> <b>x</b>?", image="copy of a.png"),
        record("bad", "<image>", image="broken.png"),
    ]
    (tmp_path / "train.json").write_text(json.dumps(train))
    (tmp_path / "dev.json").write_text(json.dumps([record("leak", "<image> y?", image="b.png")]))
    (tmp_path / "test.json").write_text(json.dumps([record("t", "hm?")]))
    return tmp_path


def test_counts_lengths_repeats_and_examples(folder):
    seen, bad = [], []
    found = check(
        tiny_config(folder),
        [SourceConfig(path=str(folder))],
        lambda kind, decoded: {"image": 5, "speech": 7}[kind] + (len(decoded) == 0 if kind == "speech" else 0),
        folder / "scratch",
        lambda *progress: seen.append(progress),
        bad.append,
    )
    assert found.records == 7 and found.samples == {"train": {"look": 4}, "dev": {"look": 1}, "test": {"look": 1}}
    assert found.groups == {"image": 4, "speech": 1, "text": 1}
    # Of pictures: a (with its copy), b and the broken one; each is decoded once.
    assert found.media == {"image": 3, "speech": 1} and found.copies == 1
    assert found.lengths.total() == 6 and list(found.lengths) == sorted(found.lengths)
    assert found.longest == max(found.lengths) < 64
    assert (found.repeated, [(r.count, r.first, r.second) for r in found.repeats]) == (
        2,
        [(2, ("train", "one"), ("train", "same as one")), (2, ("train", "two"), ("dev", "leak"))],
    )
    assert [entry["id"] for entry in bad] == ["bad"] and found.bad == 1 and len(found.reasons) == 1
    assert [example["id"] for example in found.examples] == ["one", "two", "three", "same as one", "t"]
    assert found.examples[0]["media"] == [{"kind": "image", "path": str(folder / "a.png")}]
    assert seen[-1] == ("decoding media", 4, 4) and ("reading records", 7, 7) in seen
    assert list((folder / "scratch").iterdir()) == []


@pytest.mark.parametrize(("allowed", "code"), [(0.2, 0), (0.1, 1)])
def test_the_command_writes_a_page_and_its_exit_code_says_whether_the_data_can_be_used(folder, capsys, allowed, code):
    config = tiny_config(
        folder, data={"source": str(folder), "max_bad_fraction": allowed}, mini={"random_towers": True}
    )
    path = folder / "config.yaml"
    path.write_text(dump(config))
    with pytest.raises(SystemExit) as exit:
        cli.main(["prepare", "--check", "--config", str(path)])
    said = capsys.readouterr().out
    assert exit.value.code == code
    assert "7 records: train 4 samples, dev 1 samples, test 1 samples, 1 bad" in said
    assert ("NOT usable" in said) == bool(code)
    written = config.run_dir / "check"
    assert {file.name for file in written.iterdir()} == {"index.html", "check.json", "quarantine.jsonl"}
    page = (written / "index.html").read_text()
    assert "&lt;b&gt;x&lt;/b&gt;" in page and "<b>x</b>" not in page and page.count("<rect") >= 3
    assert json.loads((written / "quarantine.jsonl").read_text())["reason"].startswith(f"{folder / 'broken.png'}: ")
    found = json.loads((written / "check.json").read_text())
    assert found["media"] == {"image": 3, "speech": 1} and sum(found["lengths"].values()) == 6
    # A picture of the small tower is 16 tokens, after <s>, a question and an answer.
    assert all(int(length) >= 16 + 3 for length in found["lengths"] if found["lengths"][length] > 1)
    assert not (config.run_dir / "prepared").exists()
    assert yaml.safe_load((config.run_dir / "config.yaml").read_text())["data"]["source"] == str(folder)


@given(st.dictionaries(st.integers(1, 5000), st.integers(1, 9), max_size=60))
def test_histogram_and_quantiles_against_the_plain_list(lengths):
    every = sorted(Counter(lengths).elements())
    bins = histogram(lengths)
    assert sum(count for *_, count in bins) == len(every) and len(bins) <= 48
    for low, high, count in bins:
        assert count == sum(low <= length <= high for length in every)
    for share in (0.5, 0.95, 1.0):
        assert quantile(lengths, share) == (every[max(0, int(np.ceil(share * len(every) - 1e-9)) - 1)] if every else 0)


def test_a_page_of_nothing(tmp_path):
    empty = dict.fromkeys(("samples", "groups", "media", "lengths", "reasons"), {})
    numbers = dict.fromkeys(("records", "bad", "repeated", "copies"), 0)
    write_check_page(tmp_path / "index.html", "none", empty | numbers | {"repeats": [], "examples": []})
    page = (tmp_path / "index.html").read_text()
    assert "No usable sample." in page and "Every record can be used." in page
