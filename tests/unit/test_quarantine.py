"""Every kind of broken input is left out with its reason, and nothing else is."""

import io
import json
import math
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pytest
import soundfile
from PIL import Image
from pyarrow import parquet

from tests.tiny import tiny_config
from tests.unit.test_media import write_video
from unimoe_ray.config.data import SourceConfig
from unimoe_ray.data.check import Checked, check
from unimoe_ray.data.sources import read_samples, record_files
from unimoe_ray.errors import UsageError

LIMIT = 2**19


def turns(question: str, answer="yes") -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def image(path: str) -> dict:
    return {"image": path, "conversations": turns("<image> x?")}


def audio(path: str) -> dict:
    return {"audio": path, "conversations": turns("<audio> x?")}


def video(path) -> dict:
    return {"video": path, "conversations": turns("<video> x?")}


def said(conversation) -> dict:
    return {"conversations": conversation}


GOOD = {
    "good text": said(turns("what?")),
    "good image": image("whole.jpg"),
    "good sound": audio("tone.wav"),
    "good film": video("film.mp4"),
    "good frames": video(["whole.jpg", "whole.jpg"]),
}
# Lines of a file of JSON lines: a record, or the line itself.
BROKEN = {
    "no JSON": (b'{"conversations": [}', r"not valid JSON \(Expecting value\)"),
    "half a line": (b'{"id": "half a line", "conv', "not valid JSON"),
    "not UTF-8": (b'{"id": "\xff\xfe"}', "has bytes that are not UTF-8"),
    "nested": (b"[" * 100_000, r"not valid JSON \(nested too deeply\)"),
    "thousands of digits": (b"1" * 9000, "not valid JSON"),
    "a list": ([], "record: .*dictionary"),
    "a text": ("text", "record: .*dictionary"),
    "null": (None, "record: .*dictionary"),
    "no conversation": ({}, "conversations: Field required"),
    "empty conversation": (said([]), "conversations: .*at least 1"),
    "a text as conversation": (said("hello"), "conversations: .*valid list"),
    "answer first": (said(turns("x")[::-1]), "turns must alternate"),
    "no answer": (said(turns("x")[:1]), "turns must alternate"),
    "two questions": (said(turns("x")[:1] * 2), "turns must alternate"),
    "another speaker": (said([{"from": "robot", "value": "x"}]), "conversations.0.from: .*'human' or 'gpt'"),
    "a turn without text": (said([{"from": "human"}]), "conversations.0.value: Field required"),
    "a number as text": (said(turns("x", 7)), "conversations.1.value: .*valid string"),
    "an empty answer": (said(turns("x", " \n")), "answer 1 is empty"),
    "a placeholder in the answer": (said(turns("x", "<image>")), "answer 1 has a media placeholder"),
    "half a character": (said(turns("\ud800")), "conversations.0.value: .*half of a surrogate pair"),
    "a number as path": (image(3), "image: "),
    "a number with a point as id": (said(turns("x")) | {"id": 1.5}, "id: "),
    "null as task": (said(turns("x")) | {"task": None}, "task: .*valid string"),
    "a placeholder too many": (image("whole.jpg") | said(turns("<image> <image>")), r"more <image> .* files \(1\)"),
    "a file too many": (image(["whole.jpg"] * 2), "2 files for 1 <image> placeholders"),
    "no placeholder": (image("whole.jpg") | said(turns("x")), "1 files for 0 <image> placeholders"),
    "voice and audio": (audio("tone.wav") | {"voice": "tone.wav"}, "voice and audio are both given"),
    "an empty path": (image(""), "image: an empty path"),
    "a null character": (image("a\0.png"), "image: a path with a null character"),
    "a video without frames": (video([[]]), "video: a video without frames"),
    "the same again": (GOOD["good text"] | {"id": "good text"}, "id 'good text' occurs twice, with the same content"),
    "too long": (said(turns("word " * 200)), "tokens with media; model.language.max_positions is 64"),
    "no such file": (image("nothing.png"), "nothing.png: No such file or directory"),
    "a folder": (image("."), "Is a directory"),
    "a pipe": (image("pipe"), "pipe: not a plain file"),
    "a link to nothing": (image("dangling.png"), "dangling.png: No such file"),
    "a name that is too long": (image("x" * 300 + ".png"), "File name too long"),
    "out of the folder": (image("../../../etc/passwd"), r"\.\./\.\./\.\./etc/passwd: leads out of "),
    "out by a detour": (image("a/../../b.png"), "a/../../b.png: leads out of "),
    "a URL": (image("http://127.0.0.1:9/a.png"), "http://127.0.0.1:9/a.png: a URL outside of "),
    "a file URL": (image("file:///etc/passwd"), "file:///etc/passwd: a URL outside of "),
    "a chained URL": (image("zip://a::/etc/x.zip"), "a URL outside of "),
    "a part of a tar": (image("tar://0+9/a::/etc/passwd"), "a URL outside of "),
    "no base64": (image("data:image/png;base64,%%%"), "data:image/png;base64,.*: not base64"),
    "a data URL of text": (image("data:text/plain,hello"), "a data URL begins with data:<type>;base64,"),
    "no bytes in a data URL": (image("data:;base64,"), "has no bytes"),
    "half a JPEG": (image("half.jpg"), "half.jpg: .*truncated"),
    "half a PNG": (image("half.png"), "half.png: .*truncated"),
    "text called PNG": (image("text.png"), "text.png: not an image that can be read"),
    "a sound called PNG": (image("sound.png"), "sound.png: not an image that can be read"),
    "a file without bytes": (image("empty.png"), "empty.png: has no bytes"),
    "900 million pixels": (image("huge.png"), "huge.png: .*900000000 pixels"),
    "more pixels than allowed": (image("wide.png"), "wide.png: 4000 x 300 pixels; at most 1000000 are allowed"),
    "greys as numbers": (image("float.tiff"), "float.tiff: greys as floating-point numbers"),
    "a program": (image("program.eps"), "program.eps: not an image that can be read"),
    "more bytes than allowed": (image("large.png"), rf"large.png: \d+ bytes; at most {LIMIT} are allowed"),
    "one broken frame": (video(["whole.jpg", "half.jpg"]), "half.jpg: .*truncated"),
    "a wav without bytes": (audio("empty.wav"), "empty.wav: has no bytes"),
    "a wav without samples": (audio("silent.wav"), "silent.wav: has no sound samples"),
    "half a header": (audio("header.wav"), "header.wav: .*[Ff]ormat"),
    "text called wav": (audio("text.wav"), "text.wav: .*[Ff]ormat"),
    "a picture as sound": (audio("whole.jpg"), "whole.jpg: "),
    "NaN": (audio("nan.wav"), "nan.wav: has samples that are not finite"),
    "infinite": (audio("inf.wav"), "inf.wav: has samples that are not finite"),
    "far too loud": (audio("loud.wav"), "loud.wav: has samples far outside of -1 to 1"),
    "an impossible rate": (audio("rate.wav"), "rate.wav: sampled at 2000000011 Hz"),
    "longer than allowed": (audio("long.wav"), "long.wav: 8 s long; at most 5 s are allowed"),
    "a film without sound": (audio("film.mp4"), "film.mp4: has no sound track"),
    "a film without pictures": (video("sound.mp4"), "sound.mp4: has no video stream"),
    "half a film": (video("half.mp4"), "half.mp4: "),
    "text called mp4": (video("text.mp4"), "text.mp4: Invalid data"),
    "a film that is too long": (video("long.mp4"), "long.mp4: longer than 5 s"),
    "a playlist": (video("list.mp4"), "list.mp4: "),
}
IN_ZIP = {
    "no such member": (image("nothing.png"), "media.zip:nothing.png: no such file in the zip"),
    "zip bomb": (image("bomb.png"), rf"media.zip:bomb.png: 67108864 bytes; at most {LIMIT} are allowed"),
    "lying zip bomb": (image("liar.png"), r"media.zip:liar.png: "),
    "a link in a zip": (image("link.png"), "media.zip:link.png: a link, not a file"),
    "a locked member": (image("locked.png"), "media.zip:locked.png: .*password required"),
    "a wrong checksum": (image("crc.png"), "media.zip:crc.png: Bad CRC-32"),
    "out of the zip": (image("../whole.jpg"), "leads out of .*media.zip"),
}
IN_TAR = {
    "a link in a tar": "link.jpg: a link, not a file",
    "a hard link in a tar": "hard.jpg: a link, not a file",
    "a device in a tar": "device.jpg: not a plain file",
    "path traversal in a tar": r"\.\./out.jpg: leads out of the tar",
    "an absolute path in a tar": "/abs.jpg: leads out of the tar",
    "twice in a tar": "twice.jpg: is in the tar twice",
    "no record": "has no .json member",
    "a broken record": "not valid JSON",
}
IN_TABLE = {
    "a row without conversation": "conversations: Field required",
    "a broken picture in a cell": "table.parquet row 2 image: not an image",
    "no bytes in a cell": "table.parquet row 3 image: has no bytes",
}


def make_media(folder: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    picture.save(folder / "whole.jpg")
    picture.save(folder / "whole.png")
    write_video(folder / "film.mp4", 4)
    tone = (0.3 * np.sin(np.arange(8000) / 10)).astype(np.float32)
    soundfile.write(folder / "tone.wav", tone, 16_000)
    for whole, half in (("whole.jpg", "half.jpg"), ("whole.png", "half.png"), ("film.mp4", "half.mp4")):
        content = (folder / whole).read_bytes()
        (folder / half).write_bytes(content[: len(content) // 2])
    for name in ("text.png", "text.wav", "text.mp4"):
        (folder / name).write_text("this is no media file at all")
    for name in ("empty.png", "empty.wav"):
        (folder / name).touch()
    (folder / "sound.png").write_bytes((folder / "tone.wav").read_bytes())
    (folder / "header.wav").write_bytes((folder / "tone.wav").read_bytes()[:11])
    (folder / "huge.png").write_bytes(bilevel_png(30_000, 30_000))
    Image.new("L", (4000, 300)).save(folder / "wide.png")
    Image.fromarray(np.ones((4, 4), np.float32)).save(folder / "float.tiff")
    (folder / "program.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (500, 500, 3), dtype=np.uint8)).save(folder / "large.png")
    soundfile.write(folder / "silent.wav", np.zeros(0), 16_000)
    for name, value in (("nan.wav", math.nan), ("inf.wav", math.inf), ("loud.wav", 1e30)):
        soundfile.write(folder / name, np.array([0.1, value], np.float32), 16_000, subtype="FLOAT")
    rate = bytearray((folder / "tone.wav").read_bytes())
    rate[24:28] = (2_000_000_011).to_bytes(4, "little")
    (folder / "rate.wav").write_bytes(rate)
    soundfile.write(folder / "long.wav", np.zeros(8000), 1000)
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    write_video(folder / "long.mp4", 8, rate=1)
    (folder / "list.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{folder / 'film.mp4'}\n")
    os.mkfifo(folder / "pipe")
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")


def bilevel_png(width: int, height: int) -> bytes:
    """A whole PNG of one colour: some hundred kilobytes that unpack to 112 MB, or 2.7 GB as RGB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, row = zlib.compressobj(1), bytes(1 + width // 8)
    pixels = b"".join([*(packer.compress(row * 100) for _ in range(height // 100)), packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def make_zip(path: Path, picture: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("good.jpg", picture)
        archive.writestr("bomb.png", bytes(2**26))
        archive.writestr("liar.png", bytes(2**22))
        link = zipfile.ZipInfo("link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("locked.png", picture)
        archive.writestr("crc.png", picture, zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    content[content.index(picture, content.index(b"crc.png")) + 50] ^= 0xFF
    directory = content.index(b"PK\x01\x02")
    liar = content.index(b"liar.png", directory) - 46
    content[liar + 24 : liar + 28] = (1000).to_bytes(4, "little")  # the size unpacked, by the directory
    locked = content.index(b"locked.png", directory) - 46
    content[locked + 8] |= 1
    header = content.index(b"locked.png") - 30
    content[header + 6] |= 1
    path.write_bytes(content)


def make_tar(path: Path, picture: bytes) -> None:
    def add(name: str, content: bytes = b"", **changes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        for key, value in changes.items():
            setattr(member, key, value)
        tar.addfile(member, io.BytesIO(content))

    def record(key: str, name: str) -> None:
        add(f"{key}.json", json.dumps({"id": name} | said(turns("<image> x?"))).encode())

    with tarfile.open(path, "w") as tar:
        record("good", "good in a tar")
        add("good.jpg", picture)
        for key, name, changes in (
            ("link", "a link in a tar", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
            ("hard", "a hard link in a tar", {"type": tarfile.LNKTYPE, "linkname": "good.jpg"}),
            ("device", "a device in a tar", {"type": tarfile.CHRTYPE}),
            ("../out", "path traversal in a tar", {}),
            ("/abs", "an absolute path in a tar", {}),
        ):
            record(key, name)
            add(f"{key}.jpg", b"" if changes else picture, **changes)
        record("twice", "twice in a tar")
        add("twice.jpg", picture)
        add("twice.jpg", picture)
        add("none.jpg", picture)
        add("broken.json", b'{"conversations": ')


def make_table(path: Path, picture: bytes) -> None:
    rows = [
        {"id": "good in a table", "image": picture} | said(turns("<image> x?")),
        {"id": "a row without conversation", "image": None, "conversations": None},
        {"id": "a broken picture in a cell", "image": b"broken"} | said(turns("<image> x?")),
        {"id": "no bytes in a cell", "image": b""} | said(turns("<image> x?")),
    ]
    parquet.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> tuple[Checked, dict[str, dict]]:
    """What a check of all of it finds, and its quarantine entries by the broken thing's name."""
    folder = tmp_path_factory.mktemp("broken")
    make_media(folder)
    picture = (folder / "whole.jpg").read_bytes()
    named = []
    for name, value in [*GOOD.items(), *((name, value) for name, (value, _) in BROKEN.items())]:
        line = (
            value
            if isinstance(value, bytes)
            else json.dumps({"id": name} | value if isinstance(value, dict) else value)
        )
        named.append((name, line if isinstance(line, bytes) else line.encode()))
    (folder / "records.jsonl").write_bytes(b"\n".join(line for _, line in named))
    (folder / "zipped.json").write_text(
        json.dumps([{"id": "good in a zip"} | image("good.jpg")] + [{"id": n} | v for n, (v, _) in IN_ZIP.items()])
    )
    make_zip(folder / "media.zip", picture)
    make_tar(folder / "web.tar", picture)
    make_table(folder / "table.parquet", picture)
    sources = [
        SourceConfig(path=str(folder / "records.jsonl")),
        SourceConfig(path=str(folder / "zipped.json"), media=str(folder / "media.zip")),
        SourceConfig(path=str(folder / "web.tar")),
        SourceConfig(path=str(folder / "table.parquet")),
    ]
    data = {"max_bytes": LIMIT, "max_seconds": 5.0, "max_pixels": 1_000_000}
    config = tiny_config(folder, data=data)
    entries: list[dict] = []
    found = check(config, sources, lambda *_: 3, folder / "scratch", lambda *_: None, entries.append)
    by_name = {}
    for entry in entries:
        if entry["file"].endswith("records.jsonl"):
            by_name[named[int(entry["where"].removeprefix("line ")) - 1][0]] = entry
        elif entry["file"].endswith("web.tar"):
            by_name[_tar_names()[entry["where"].removeprefix("sample ")]] = entry
        else:
            by_name[entry["id"]] = entry
    assert len(by_name) == len(entries) == found.bad
    return found, by_name


def _tar_names() -> dict[str, str]:
    keys = ["link", "hard", "device", "../out", "/abs", "twice", "none", "broken"]
    return dict(zip(keys, IN_TAR, strict=True))


REASONS = {name: reason for part in (BROKEN, IN_ZIP) for name, (_, reason) in part.items()} | IN_TAR | IN_TABLE


@pytest.mark.parametrize("name", REASONS)
def test_broken_input_has_its_reason(checked, name):
    entry = checked[1][name]
    assert re.search(REASONS[name], entry["reason"]), entry["reason"]
    assert "\n" not in entry["reason"] and entry["split"] == "train" and entry["where"]


def test_nothing_else_is_left_out(checked):
    found, entries = checked
    assert entries.keys() == REASONS.keys()
    good = len(GOOD) + 3
    assert found.records == good + len(REASONS) and found.samples["train"] == {"default": good}
    assert found.groups == {"text": 1, "image": 4, "audio": 1, "video": 2}
    assert found.reasons["record: Input should be a valid dictionary or instance of _Record"] == 3
    assert found.reasons["No such file or directory"] == 2 and found.reasons.total() == found.bad
    assert not found.usable(0.01) and found.usable(1.0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"a": 1}, {"b"', r"not valid JSON at record 1"),
        ("a.json", b'[{"a": 1} {"b": 1}]', r"not valid JSON at record 1 \(a comma or \] is missing\)"),
        ("a.json", b'[{"a": 1}] x', r"not valid JSON at record 1 \(there is more after the list\)"),
        ("a.json", b"[" * 100_000, "not valid JSON at record 0 (.*nested too deeply)"),
        ("a.json", b'{"a": 1}\n{"a": 2}', "must hold a JSON list of records, not dict; .* format jsonl"),
        ("a.json", b"", "not valid JSON for a list of records"),
        ("a.tar", b"", "not a tar that can be read"),
        ("a.tar", b"\x1f\x8b" + bytes(600), "not a tar .*; members of a compressed tar can't be read one by one"),
        ("a.parquet", b"PAR1 nothing PAR1", "not a Parquet file that can be read"),
    ],
)
def test_files_whose_rest_cant_be_read_stop_the_run(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as error:
        list(read_samples(record_files([SourceConfig(path=str(path))])[0], "speech"))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_table_without_conversations_names_its_columns(tmp_path):
    parquet.write_table(pa.table({"text": ["x"], "url": ["y"]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="has no column 'conversations'; it has text, url"):
        list(read_samples(record_files([SourceConfig(path=str(tmp_path / "a.parquet"))])[0], "speech"))
