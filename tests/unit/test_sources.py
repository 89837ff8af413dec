"""Sources of every form: the same records and media, however they are written and wherever they lie."""

import base64
import io
import json
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tests.bucket import bucket
from tests.tiny import tiny_config
from unimoe_ray.config.data import DataConfig, SourceConfig
from unimoe_ray.data import records
from unimoe_ray.data.catalog import Catalog
from unimoe_ray.data.gather import read_into
from unimoe_ray.data.sources import BadRecord, Placed, absolute, read_samples, record_files, sources_of
from unimoe_ray.errors import UsageError

RNG = np.random.default_rng(0)
FILES = {f"media/{name}": RNG.bytes(100 + i) for i, name in enumerate(("a.jpg", "b.jpg", "c.wav", "d.mp3", "e.mp4"))}


def turns(question: str, answer: str = "yes") -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


# The official forms: voice as a list of paths, a video as a list of frames, several turns.
RECORDS = [
    {"id": "text", "conversations": turns("what?")},
    {"id": "voice", "voice": ["media/c.wav", "media/d.mp3"], "conversations": turns("<audio>\n<audio> x?")},
    {"id": "image", "image": "media/a.jpg", "voice": "media/c.wav", "conversations": turns("<image>\n<audio>")},
    {"id": "frames", "video": ["media/a.jpg", "media/b.jpg"], "conversations": turns("<video>\nDescribe it.")},
    {"id": "film", "video": "media/e.mp4", "speech": "media/d.mp3", "conversations": turns("<video> <speech>")},
]


def names(sources: list[SourceConfig], folder: Path, voice_as: str = "speech") -> dict[str, list]:
    """Turns and content names of each sample of all sources, by id; no record may be bad."""
    config = tiny_config(folder, data={"voice_as": voice_as})
    with Catalog(folder / "catalog", 2**20) as catalog:
        read_into(catalog, record_files(sources), config, lambda *_: None)
        assert list(catalog.bad()) == []
        entries = [entry for split in ("train", "dev", "test") for entry in catalog.samples(split)]
    return {entry.placed.sample.id: [entry.placed.sample.turns, entry.names] for entry in entries}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected")
    return names([SourceConfig(path=str(write_plain(folder, "json")))], folder)


def write_plain(folder: Path, form: str, entries: list[dict] = RECORDS) -> Path:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    path = folder / f"records.{form}"
    path.write_text("\n".join(map(json.dumps, entries)) if form == "jsonl" else json.dumps(entries))
    return path


def with_media(entry: dict, change) -> dict:
    """A record with each media path replaced."""
    fields = entry.keys() & {"image", "voice", "speech", "video"}
    return entry | {k: [change(p) for p in v] if isinstance(v := entry[k], list) else change(v) for k in fields}


def archive(path: Path, prefix: str = "") -> None:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in FILES.items():
                file.writestr(prefix + name, content)
    else:
        with tarfile.open(path, "w") as file:
            for name, content in FILES.items():
                add(file, prefix + name, content)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def test_the_expected_samples_are_those_of_the_records(expected):
    assert list(expected) == [entry["id"] for entry in RECORDS]
    assert [name.split("/")[0] for name in expected["voice"][1]] == ["speech", "speech"]
    assert [name.split("/")[0] for name in expected["film"][1]] == ["video", "speech"]
    # Frames are one video; its name is not that of any of its files.
    assert len(expected["frames"][1]) == 1 and len({n for _, found in expected.values() for n in found}) == 5


def test_json_lines(expected, tmp_path):
    assert names([SourceConfig(path=str(write_plain(tmp_path, "jsonl")))], tmp_path) == expected


@pytest.mark.parametrize("suffix", ["zip", "tar"])
def test_media_in_an_archive(expected, tmp_path, suffix):
    path = tmp_path / "records.json"
    path.write_text(json.dumps(RECORDS))
    archive(tmp_path / f"files.{suffix}", "" if suffix == "zip" else "./")
    assert names([SourceConfig(path=str(path), media=str(tmp_path / f"files.{suffix}"))], tmp_path) == expected


def test_pictures_in_a_zip_and_sounds_by_absolute_paths_as_the_official_data_have_them(expected, tmp_path):
    (tmp_path / "far").mkdir()
    write_plain(tmp_path / "far", "json")
    archive(tmp_path / "pictures.zip")

    def far(path: str) -> str:
        return path if path.endswith(".jpg") else str(tmp_path / "far" / path)

    (tmp_path / "r.json").write_text(json.dumps([with_media(entry, far) for entry in RECORDS]))
    pictures = str(tmp_path / "pictures.zip")
    source = SourceConfig(path=str(tmp_path / "r.json"), media={"image": pictures, "video": pictures})
    assert names([source], tmp_path) == expected


def test_data_urls_and_bare_base64(expected, tmp_path):
    def inline(path: str) -> str:
        kind = {"jpg": "image/jpeg", "wav": "audio/wav", "mp3": "audio/mpeg", "mp4": "video/mp4"}[path[-3:]]
        return f"data:{kind};base64,{base64.b64encode(FILES[path]).decode()}"

    path = tmp_path / "r.json"
    path.write_text(json.dumps([with_media(entry, inline) for entry in RECORDS]))
    assert names([SourceConfig(path=str(path))], tmp_path) == expected
    content = RNG.bytes(160)
    (tmp_path / "big.bin").write_bytes(content)
    both = [
        {"id": "a", "image": base64.encodebytes(content).decode(), "conversations": turns("<image>")},
        {"id": "b", "image": "big.bin", "conversations": turns("<image> b")},
    ]
    path.write_text(json.dumps(both))
    found = names([SourceConfig(path=str(path))], tmp_path)
    assert found["a"][1] == found["b"][1]


@pytest.mark.parametrize("form", ["bytes", "struct", "path"])
def test_parquet(expected, tmp_path, form):
    """Media as bytes, as Hugging Face's {bytes, path}, or as paths; over several row groups."""
    write_plain(tmp_path, "json")
    value = {
        "bytes": pa.binary(),
        "struct": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "path": pa.string(),
    }
    turn = pa.struct({"from": pa.string(), "value": pa.string()})
    schema = pa.schema(
        [("id", pa.string()), ("conversations", pa.list_(turn)), ("image", value[form]), ("speech", value[form])]
        + [("voice", pa.list_(value[form])), ("video", pa.list_(value[form]))]
    )

    def change(path: str):
        content = FILES[path]
        if path.endswith(".jpg"):
            content = b"\xff\xd8\xff" + content
        return {"bytes": content, "struct": {"bytes": content, "path": path}, "path": path}[form]

    rows = [with_media(entry, change) for entry in RECORDS]
    for row in rows:
        for field in ("voice", "video"):
            row[field] = [row[field]] if isinstance(row.get(field), bytes | dict | str) else row.get(field)
    path = tmp_path / "records.parquet"
    parquet.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=2)
    found = names([SourceConfig(path=str(path))], tmp_path)
    kinds = {key: [name.split("/")[0] for name in media] for key, (_, media) in expected.items()}
    assert {key: [name.split("/")[0] for name in media] for key, (_, media) in found.items()} == kinds
    if form == "path":
        assert found == expected
    for key in ("voice", "film"):  # sounds and films have their bytes as they are
        assert found[key] == expected[key]


def test_webdataset(expected, tmp_path):
    """Members named in the record, by what follows the key, or not at all; two shards of a pattern."""
    for shard, entries in ((0, RECORDS[:2]), (1, RECORDS[2:])):
        with tarfile.open(tmp_path / f"shard-{shard}.tar", "w") as tar:
            for entry in entries:
                used = [path for key in ("image", "voice", "video", "speech") for path in _list(entry.get(key, []))]
                plain = {key: entry[key] for key in ("id", "conversations")}
                if entry["id"] == "frames":  # the record names its members
                    plain["video"] = ["0.jpg", "frames.1.jpg"]
                    parts = ["0.jpg", "1.jpg"]
                else:
                    parts = [f"{i}.{_field(entry, path)}.{path[-3:]}" for i, path in enumerate(used)]
                add(tar, f"x/{entry['id']}.json", json.dumps(plain).encode())
                for part, path in zip(parts, used, strict=True):
                    add(tar, f"x/{entry['id']}.{part}", FILES[path])
    assert names([SourceConfig(path=str(tmp_path / "shard-*.tar"))], tmp_path) == expected


def _list(value):
    return [value] if isinstance(value, str) else value


def _field(entry: dict, path: str) -> str:
    return next(key for key in ("image", "voice", "video", "speech") if path in _list(entry.get(key, [])))


def test_endings_of_webdataset_members_say_what_they_are(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        add(tar, "._a.jpg", b"what a Mac leaves")
        add(tar, "a.jpg", FILES["media/a.jpg"])
        add(tar, "a.MP3", FILES["media/d.mp3"])
        add(tar, "a.json", json.dumps({"conversations": turns("<image> <audio>")}).encode())
        add(tar, "b.txt", b"a caption")
        add(tar, "b.json", json.dumps({"conversations": turns("b")}).encode())
    found = names([SourceConfig(path=str(tmp_path / "s.tar"))], tmp_path, voice_as="audio")
    assert [name.split("/")[0] for name in found["a"][1]] == ["image", "audio"] and found["b"][1] == []


@pytest.mark.parametrize("where", ["memory", "http", "s3"])
@pytest.mark.parametrize("form", ["json", "zip", "tar", "webdataset", "parquet"])
def test_urls(expected, tmp_path, monkeypatch, where, form):
    write_plain(tmp_path, "json")
    archive(tmp_path / "m.zip")
    archive(tmp_path / "m.tar")
    with tarfile.open(tmp_path / "w.tar", "w") as tar:
        for entry in RECORDS:
            local = with_media(entry, lambda path: Path(path).name)
            add(tar, f"{entry['id']}.json", json.dumps(local).encode())
            for path in (p for key in ("image", "voice", "video", "speech") for p in _list(entry.get(key, []))):
                add(tar, f"{entry['id']}.{Path(path).name}", FILES[path])
    table = pa.Table.from_pylist([entry | {"voice": None, "video": None} for entry in RECORDS[:3:2]])
    parquet.write_table(table, tmp_path / "p.parquet")
    files = {f"set/{p.relative_to(tmp_path)}": p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with bucket(files) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server)
        for key, value in (("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s"), ("EC2_METADATA_DISABLED", "true")):
            monkeypatch.setenv(f"AWS_{key}", value)
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        root = {"memory": "memory://set", "http": f"{server}/set", "s3": "s3://set"}[where]
        if where == "memory":
            system = fsspec.filesystem("memory")
            for name, content in files.items():
                system.pipe(f"/{name}", content)
        from unimoe_ray.data import locations

        locations._native.cache_clear()  # each test has a server of its own
        source = {
            "json": SourceConfig(path=f"{root}/records.json"),
            "zip": SourceConfig(path=f"{root}/records.json", media=f"{root}/m.zip"),
            "tar": SourceConfig(path=f"{root}/records.json", media=f"{root}/m.tar"),
            "webdataset": SourceConfig(path=f"{root}/w.tar"),
            "parquet": SourceConfig(path=f"{root}/p.parquet"),
        }[form]
        if form == "parquet":
            found = {entry.sample.id for entry in read_samples(record_files([source])[0], "speech") if _good(entry)}
            assert found == {"text"}  # the other one's sound is left out of the table
        else:
            assert names([source], tmp_path) == expected
        if where != "http":  # which can't list a folder
            files = record_files([SourceConfig(path=root, split="train", format="json")])
            assert [file.url for file in files if file.url.endswith(".json")] == [f"{root}/records.json"]


def _good(item) -> bool:
    return isinstance(item, Placed)


# Which files belong to which split


def test_splits_by_the_names_of_files_and_folders(tmp_path):
    for name in ("train-00.jsonl", "train_1.tar", "val.json", "test/x.parquet", "info.json", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    files = record_files([SourceConfig(path=str(tmp_path))])
    assert [(Path(file.url).name, file.form, file.split) for file in files] == [
        ("train-00.jsonl", "jsonl", "train"),
        ("train_1.tar", "webdataset", "train"),
        ("val.json", "json", "dev"),
        ("x.parquet", "parquet", "test"),
    ]
    files = record_files([SourceConfig(path=str(tmp_path / "*.js*"), split="train"), SourceConfig(path=str(tmp_path))])
    assert [Path(file.url).name for file in files[:3]] == ["info.json", "train-00.jsonl", "val.json"]
    assert {file.split for file in files[:3]} == {"train"}


def test_a_folder_without_names_of_splits_is_all_for_training(tmp_path):
    for name in ("b.parquet", "a.jsonl"):
        (tmp_path / name).touch()
    files = record_files([SourceConfig(path=str(tmp_path), split="train", task="t")])
    assert [(Path(f.url).name, f.split, f.task) for f in files] == [
        ("a.jsonl", "train", "t"),
        ("b.parquet", "train", "t"),
    ]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing", "nothing: no such file or folder"),
        ("*.json", r"\*.json: no file of records there"),
        ("empty", "empty: no file of records there"),
        ("x.csv", "x.csv: unknown ending; allowed: .json, .jsonl, .ndjson, .parquet, .tar"),
        ("dev", "train.json: no such file; a data folder holds train.json"),
        ("dev/test.json", "none of them has records for training"),
        ("what://x/y.json", "what://x/y.json: Protocol not known"),
    ],
)
def test_sources_that_are_not_there(tmp_path, path, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "dev").mkdir()
    (tmp_path / "x.csv").touch()
    (tmp_path / "dev" / "test.json").touch()
    with pytest.raises(UsageError, match=message) as error:
        record_files([SourceConfig(path=path if "://" in path else str(tmp_path / path))])
    assert "\n" not in str(error.value)


def test_what_a_configuration_names():
    assert [s.path for s in sources_of(DataConfig(), Path("/suite"))] == ["/suite"]
    assert [s.path for s in sources_of(DataConfig(source="x"))] == ["x"]
    data = DataConfig(sources=[{"path": "s3://b/x.json", "media": {"image": "m.zip"}}, {"path": "y", "media": "z"}])
    first, second = absolute(data).sources
    assert first.path == "s3://b/x.json" and first.media == {"image": str(Path.cwd() / "m.zip")}
    assert (second.path, second.media) == (str(Path.cwd() / "y"), str(Path.cwd() / "z"))
    with pytest.raises(ValueError, match="data.sources is given too"):
        DataConfig(source="x", sources=[{"path": "y"}])


def test_tasks_of_sources_and_ids_that_come_again(tmp_path):
    same = {"id": 7, "conversations": turns("a")}
    other = {"id": 7, "conversations": turns("b"), "task": "own"}
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [same, other, same])))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, [{"id": "7~2", "conversations": turns("c")}, same])))
    sources = [SourceConfig(path=str(tmp_path / "a.jsonl"), task="t"), SourceConfig(path=str(tmp_path / "b.jsonl"))]
    with Catalog(tmp_path / "catalog", 100) as catalog:
        read_into(catalog, record_files(sources), tiny_config(tmp_path), lambda *_: None)
        found = [(e.placed.sample.id, e.placed.sample.task, e.placed.source) for e in catalog.samples("train")]
        assert found == [("7", "t", 0), ("7~2", "own", 0), ("7~2~2", "default", 1)]
        assert [(bad["where"], bad["reason"]) for bad in catalog.bad()] == [
            ("line 3", "id '7' occurs twice, with the same content"),
            ("line 2", "id '7' occurs twice, with the same content"),
        ]


def test_official_evaluation_records_have_their_answer_beside_the_conversation(tmp_path):
    asked = {"question_id": 12, "gt": "A", "conversations": turns("which?", "")}
    (tmp_path / "test.json").write_text(json.dumps([asked, asked | {"gt": None, "question_id": 13}]))
    (tmp_path / "train.json").write_text(json.dumps([asked]))
    (tmp_path / "dev.json").write_text("[]")
    _, test, train = record_files([SourceConfig(path=str(tmp_path))])
    good, bad = read_samples(test, "speech")
    assert (good.sample.id, good.sample.turns) == ("12", (("which?", "A"),))
    assert bad.reason == "conversations: answer 1 is empty"
    assert [item.reason for item in read_samples(train, "speech")] == ["conversations: answer 1 is empty"]


# Streams


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(json_values, max_size=8), st.integers(1, 40), st.sampled_from([None, 1]), st.booleans())
def test_a_list_read_in_pieces_is_the_list(tmp_path_factory, values, piece, indent, ascii):
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps(values, indent=indent, ensure_ascii=ascii) + "\n", errors="surrogatepass")
    records.PIECE, usual = piece, records.PIECE
    try:
        assert [raw.record for raw in records.read_json(str(path))] == json.loads(path.read_text())
    finally:
        records.PIECE = usual


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_files_of_records_are_read_or_refused(tmp_path_factory, whole_sources, data):
    """Any bytes overwritten, cut anywhere: samples, bad records with one line each, or UsageError."""
    name, content = data.draw(st.sampled_from(whole_sources))
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(0, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / name
    path.write_bytes(damaged[: data.draw(st.integers(len(damaged) // 2, len(damaged)))])
    try:
        for item in read_samples(record_files([SourceConfig(path=str(path))])[0], "speech"):
            assert isinstance(item, Placed) or (item.reason and "\n" not in item.reason)
    except UsageError as error:
        assert str(path) in str(error) and "\n" not in str(error)


@pytest.fixture(scope="module")
def whole_sources(tmp_path_factory) -> list[tuple[str, bytes]]:
    folder = tmp_path_factory.mktemp("whole")
    (folder / "train.json").write_text(json.dumps(RECORDS, indent=1))
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    with tarfile.open(folder / "train.tar", "w") as tar:
        for entry in RECORDS[:3]:
            add(tar, f"{entry['id']}.json", json.dumps(entry).encode())
            add(tar, f"{entry['id']}.jpg", b"x" * 30)
    rows = [{"id": e["id"], "conversations": e["conversations"], "image": b"abc"} for e in RECORDS]
    parquet.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return [(path.name, path.read_bytes()) for path in sorted(folder.iterdir())]


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=80), st.sampled_from(["json", "jsonl", "parquet", "tar"]))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content, ending):
    path = tmp_path_factory.mktemp("any") / f"a.{ending}"
    path.write_bytes(content)
    try:
        for item in read_samples(record_files([SourceConfig(path=str(path))])[0], "speech"):
            assert isinstance(item, BadRecord) and item.reason
    except UsageError as error:
        assert str(path) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet", "webdataset"])
def test_ten_times_the_records_need_no_more_memory(tmp_path, monkeypatch, form):
    """Python's own peak while all is read into the catalog (the rest of the process is the same for both)."""

    def peak(count: int) -> int:
        path = write_many(tmp_path / f"{form}-{count}", form, count)
        config = tiny_config(tmp_path)
        files = record_files([SourceConfig(path=str(path), format=form)])
        tracemalloc.start()
        with Catalog(tmp_path / "catalog", 100) as catalog:
            assert read_into(catalog, files, config, lambda *_: None) == count
            assert sum(1 for _ in catalog.samples("train")) == count
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    monkeypatch.setattr(records, "PIECE", 2**14)
    peak(10)
    small, large = peak(150), peak(1500)
    # The footer of a Parquet file grows with its row groups; the records themselves are 3 MB.
    assert large <= 1.1 * small + 2**16, (small, large)


def write_many(path: Path, form: str, count: int) -> Path:
    many = [{"id": f"{i:05d}", "conversations": turns(f"{i} " + "what? " * 400)} for i in range(count)]
    if form == "parquet":
        parquet.write_table(pa.Table.from_pylist(many), path, row_group_size=100)
    elif form == "webdataset":
        with tarfile.open(path, "w") as tar:
            for entry in many:
                add(tar, f"{entry['id']}.json", json.dumps(entry).encode())
    else:
        path.write_text("\n".join(map(json.dumps, many)) if form == "jsonl" else json.dumps(many))
    return path
