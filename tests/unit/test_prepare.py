"""Preparing text records, and media that are in the store already: no cluster is needed for either."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import tiny_config
from unimoe_ray.config.data import SPLITS, SourceConfig
from unimoe_ray.config.model import MODALITIES
from unimoe_ray.data import prepare as preparing
from unimoe_ray.data.encode import EncodeSettings
from unimoe_ray.data.loader import read_features
from unimoe_ray.data.locations import content_key
from unimoe_ray.data.prompt import decode
from unimoe_ray.data.samples import SampleTable
from unimoe_ray.data.store import StoredFeatures, partition_dir, write_block
from unimoe_ray.data.tokenizer import load_tokenizer
from unimoe_ray.errors import UnimoeError


def record(name, question="what?", answer="this one", **fields):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "task": "read", "conversations": turns, **fields}


def write_splits(root: Path, **splits) -> None:
    root.mkdir(exist_ok=True)
    for name in SPLITS:
        (root / f"{name}.json").write_text(json.dumps(splits.get(name, [])))


class Project:
    """A configuration, a data folder, and how to prepare them."""

    def __init__(self, folder: Path, **changes):
        self.root = folder / "source"
        self.config = tiny_config(folder, **changes)

    def settings(self) -> EncodeSettings:
        fingerprints = {kind: f"{kind}-tower" for kind in MODALITIES}
        store = str(Path(self.config.data.dir) / "features")
        return EncodeSettings(store, fingerprints, 2, self.config.data, load_tower=dict)

    def prepare(self) -> preparing.Prepared:
        sources = [SourceConfig(path=str(self.root))]
        return preparing.prepare(self.config, sources, self.settings(), lambda _, n: sum(n), 1, lambda *_: None)

    def quarantine(self) -> list[dict]:
        return [json.loads(line) for line in (self.config.run_dir / "quarantine.jsonl").read_text().splitlines()]

    def table(self, split: str) -> SampleTable:
        return SampleTable(Path(preparing.source(self.config, split).samples))

    def tokenizer(self):
        return load_tokenizer(preparing.tokenizer_path(self.config))


def key(path: Path) -> str:
    return content_key([str(path)], 2**20)


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path, data={"max_bad_fraction": 1.0})


def test_text_records(project):
    write_splits(
        project.root, train=[record("a"), record("b", answer="two")], test=[record("a"), record("c") | {"task": "t"}]
    )
    found = project.prepare()
    assert found == preparing.Prepared({"train": {"read": 2}, "dev": {}, "test": {"read": 1, "t": 1}}, 0, 0, 0)
    train, test = project.table("train"), project.table("test")
    assert [train.get(row).id for row in range(2)] == ["a", "b"] and len(project.table("dev")) == 0
    sample, prompt = train.get(0), test.get(0)
    answer = [label for label in sample.labels if label >= 0]
    assert decode(answer, project.tokenizer()) == "this one" and answer[-1] == 2
    # A held-out sample is only its prompt: the answer is not even there.
    assert prompt.ids == sample.ids[: -len(answer)] and prompt.labels == []
    assert project.quarantine() == []


def test_the_dev_split_is_also_kept_with_its_answers(project):
    long = " ".join(["word"] * 60)
    write_splits(project.root, train=[record("a")], dev=[record("b"), record("c", answer=long)])
    assert project.prepare().samples["dev"] == {"read": 2}
    # An answer that is too long to learn is no reason not to ask; it is only left out of the loss.
    whole, prompt = project.table(preparing.VALIDATION), project.table("dev").get(0)
    assert len(whole) == 1 and len(project.table("dev")) == 2
    answer = [label for label in whole.get(0).labels if label >= 0]
    assert whole.get(0).id == "b" and whole.get(0).ids == prompt.ids + answer
    assert decode(answer, project.tokenizer()) == "this one"
    # A folder that was prepared before there was such a file gets it.
    path = preparing.data_dir(project.config) / f"{preparing.VALIDATION}.arrow"
    path.unlink()
    project.prepare()
    assert path.is_file()


def test_bad_records_go_to_quarantine_with_their_reasons(project):
    long = " ".join(["word"] * 200)
    train = [
        record("good"),
        record("image", "<image> what?"),
        record("unused", image="a.png"),
        record("good"),
        record("good", answer="again"),
        record("mute", answer="  "),
        record("long", long),
        record("gone", "<audio>", audio="gone.wav"),
        record("folder", "<image>", image="."),
        record(None) | {"conversations": 3},
        "text",
    ]
    # A prompt must leave room for the answer: 64 positions, 4 kept, 3 for <s>, the leading space and <|assistant|>.
    write_splits(project.root, train=train, dev=[record("good", "!" * 57), record("tight", "!" * 58)])
    found = project.prepare()
    assert found.samples == {"train": {"read": 2}, "dev": {"read": 1}, "test": {}}
    # Other records under the same id are kept.
    assert [project.table("train").get(row).id for row in range(2)] == ["good", "good~2"]
    entries = project.quarantine()
    assert found.quarantined == len(entries) == 10
    reasons = {(entry["split"], entry["id"]): entry["reason"] for entry in entries}
    expected = {
        ("train", "image"): "more <image> placeholders than files (0)",
        ("train", "unused"): "1 files for 0 <image> placeholders",
        ("train", "good"): "id 'good' occurs twice, with the same content",
        ("train", "mute"): "conversations: answer 1 is empty",
        ("train", "gone"): f"{project.root / 'gone.wav'}: No such file or directory",
        ("train", "folder"): f"{project.root}: Is a directory",
        ("train", "None"): "conversations: Input should be a valid list",
        ("train", "10"): "record: Input should be a valid dictionary or instance of _Record",
    }
    assert {key: reasons[key] for key in expected} == expected
    assert "tokens with media; model.language.max_positions is 64" in reasons["train", "long"]
    assert (
        reasons["dev", "tight"] == "61 tokens with media and 4 kept for the answer; model.language.max_positions is 64"
    )


@pytest.mark.parametrize(("bad", "stops"), [(1, False), (2, True)])
@pytest.mark.parametrize("kind", ["record", "file", "length"])
def test_too_many_bad_records_stop_the_run(tmp_path, bad, stops, kind):
    project = Project(tmp_path, data={"max_bad_fraction": 0.1})
    broken = {
        "record": lambda i: record(f"bad{i}", answer=""),
        "file": lambda i: record(f"bad{i}", "<image>", image="gone.png"),
        "length": lambda i: record(f"bad{i}", "b " * 100),
    }[kind]
    train = [record(f"good{i}") for i in range(7 - bad)] + [broken(i) for i in range(bad)]
    write_splits(project.root, train=train, dev=[record("d")], test=[record("t"), record("u")])
    if not stops:
        assert project.prepare().quarantined == 1
        return
    with pytest.raises(UnimoeError, match="2 of 10 records are bad, more than data.max_bad_fraction=0.1") as error:
        project.prepare()
    assert "\n" not in str(error.value) and str(project.config.run_dir / "quarantine.jsonl") in str(error.value)
    assert len(project.quarantine()) == 2
    with pytest.raises(UnimoeError, match="no prepared data; run 'unimoe prepare'"):
        preparing.source(project.config, "train")


def test_nothing_is_done_twice_and_changes_are_seen(project):
    write_splits(project.root, train=[record("a"), record("b", answer="")])
    first = project.prepare()
    arrow = Path(preparing.source(project.config, "train").samples)
    written = arrow.stat().st_mtime_ns
    assert project.prepare() == first and arrow.stat().st_mtime_ns == written
    project.config.training.workers = 1  # has nothing to do with the data
    assert project.prepare() == first and arrow.stat().st_mtime_ns == written
    write_splits(project.root, train=[record("a"), record("b")])
    assert project.prepare().samples["train"] == {"read": 2}
    project.config.model.language.vocab_size = 300
    project.prepare()
    assert project.tokenizer().get_vocab_size() <= 300


def test_a_failed_preparation_is_not_taken_for_the_one_before(project):
    write_splits(project.root, train=[record("a"), record("b", "b " * 100)])
    first = project.prepare()
    tokenizer = preparing.tokenizer_path(project.config).read_bytes()
    other = Project(project.root.parent, data={"max_bad_fraction": 0.0}, model={"language": {"vocab_size": 270}})
    with pytest.raises(UnimoeError, match="1 of 2 records"):
        other.prepare()
    assert preparing.tokenizer_path(project.config).read_bytes() != tokenizer
    assert project.prepare() == first
    assert preparing.tokenizer_path(project.config).read_bytes() == tokenizer


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "train.json: no such file; a data folder holds train.json, dev.json and test.json"),
        (b'{"a": 1}', "train.json: must hold a JSON list of records, not dict"),
        (b"[{]", "train.json: not valid JSON"),
        (b"\xff\xfe", "train.json: not valid JSON"),
    ],
)
def test_unreadable_splits(project, content, message):
    write_splits(project.root)
    path = project.root / "train.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnimoeError, match=message) as error:
        project.prepare()
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_media_that_are_in_the_store(project):
    project.root.mkdir()
    files = [project.root / name for name in ("a.png", "b.png", "c.wav")]
    for path in files:
        path.write_bytes(path.name.encode())
    settings = project.settings()
    for kind, paths, n in (("image", files[:2], 4), ("audio", files[2:], 3)):
        values = np.random.default_rng(n).normal(size=(2, n, 5)).astype(np.float16)
        folder = partition_dir(Path(settings.root), kind, settings.fingerprints[kind])
        write_block(
            folder, [content_key([str(p)], 2**20) for p in paths], [StoredFeatures(values, [n, n - 1]) for _ in paths]
        )
    train = [
        record("x", "<audio> and <image>\nwhat?", audio="c.wav", image="b.png"),
        record("y", "<image> <image>", image=["a.png", "a.png"]),
    ]
    write_splits(project.root, train=train)
    found = project.prepare()
    assert (found.media, found.encoded, found.samples["train"]) == (3, 0, {"read": 2})
    source, table = preparing.source(project.config, "train"), project.table("train")
    x, y = table.get(0), table.get(1)
    assert (x.group, x.soft_tokens, y.group, y.soft_tokens) == ("audio+image", [5, 7], "image", [7, 7])
    assert [i for i in x.ids if i < 0] == [-300, -200] and table.lengths[0] == len(x.ids) - 2 + 12
    assert x.media == [f"audio/{key(files[2])}", f"image/{key(files[1])}"]
    assert read_features(source, x.media[0]).values.shape == (2, 3, 5)
    assert sorted(source.partitions) == ["audio", "image"]
