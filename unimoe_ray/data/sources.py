"""The sources of a configuration: which files hold which split, and their records as samples, one after another."""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from unimoe_ray.config.data import SPLITS, DataConfig, SourceConfig
from unimoe_ray.data.locations import file_system, is_url, os_errors, reason
from unimoe_ray.data.places import Places
from unimoe_ray.data.records import format_of, is_record_file, read_file
from unimoe_ray.data.schema import BadSample, Kind, Sample, parse_record
from unimoe_ray.errors import UsageError

# Names of files and folders that belong to a split: train.json, val-00001.tar, test/part.parquet.
_SPLIT_NAMES = {"train": "train", "training": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev"}
_SPLIT_NAMES |= {"test": "test", "eval": "test"}
_WORD = re.compile(r"[a-z]+", re.IGNORECASE)


@dataclass(frozen=True)
class RecordFile:
    """One file of records. ``source``: the number of its entry in the configuration."""

    url: str
    form: str
    split: str
    source: int
    places: Places
    task: str | None


@dataclass(frozen=True)
class BadRecord:
    """A record that can't be used: ``file`` and ``where`` in it, its id (or its number), and the reason."""

    file: str
    where: str
    id: str
    reason: str


@dataclass(frozen=True)
class Placed:
    """A sample and where its record stands."""

    sample: Sample
    file: str
    where: str
    source: int

    def bad(self, why: str) -> BadRecord:
        return BadRecord(self.file, self.where, self.sample.id, why)


def sources_of(data: DataConfig, suite: Path | None = None) -> list[SourceConfig]:
    """What a configuration names: ``data.sources``, else the folder ``data.source``, else the embedded suite's."""
    if data.sources:
        return data.sources
    return [SourceConfig(path=str(suite if data.is_mini else data.source))]


def absolute(data: DataConfig) -> DataConfig:
    """The same with absolute local paths, so that the configuration is good from any folder."""

    def full(path: str) -> str:
        return path if is_url(path) else str(Path(path).resolve())

    def full_source(source: SourceConfig) -> SourceConfig:
        media = source.media
        media = {k: full(v) for k, v in media.items()} if isinstance(media, dict) else media and full(media)
        return source.model_copy(update={"path": full(source.path), "media": media})

    update = {"dir": full(data.dir), "sources": [full_source(source) for source in data.sources]}
    if data.source != "mini":
        update["source"] = full(data.source)
    return data.model_copy(update=update)


def record_files(sources: list[SourceConfig]) -> list[RecordFile]:
    """The files of all sources, in order. Raises UsageError: nothing there, no training records, unknown formats."""
    files = [file for number, source in enumerate(sources) for file in _files(number, source)]
    if len(sources) == 1 and sources[0].split is None and _is_folder(sources[0].path):
        for split in SPLITS:
            if not any(file.split == split for file in files):
                raise UsageError(
                    f"{posixpath.join(sources[0].path, split)}.json: no such file; a data folder holds train.json, "
                    "dev.json and test.json (or .jsonl, .parquet, .tar, one or many)"
                )
    if not any(file.split == "train" for file in files):
        raise UsageError("data.sources: none of them has records for training")
    return files


def read_samples(file: RecordFile, voice_as: Kind) -> Iterator[Placed | BadRecord]:
    """The samples of one file, and the records that are none. Raises UsageError for a file that can't be read on."""
    held_out = file.split != "train"
    with _usage_errors(file.url):
        for raw in read_file(file.url, file.form):
            locate = Places(file.places.fields, raw.media).locate
            try:
                if raw.fault is not None:
                    raise BadSample(raw.fault)
                sample = parse_record(raw.record, raw.index, voice_as, held_out=held_out, task=file.task, locate=locate)
            except BadSample as error:
                shown = raw.record.get("id", raw.index) if isinstance(raw.record, dict) else raw.index
                yield BadRecord(file.url, raw.where, str(shown), str(error))
            else:
                yield Placed(sample, file.url, raw.where, file.source)


def fingerprint(files: list[RecordFile]) -> str:
    """Changes when a file of records does: by the content of local JSON, else by what the file system says of it."""
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.url}\0{file.form}\0{file.split}\0{file.source}\0{file.task}\0".encode())
        total.update(repr({name: place.root for name, place in file.places.fields.items()}).encode())
        if not is_url(file.url) and file.form in ("json", "jsonl"):
            with open(file.url, "rb") as content:
                total.update(hashlib.file_digest(content, "sha256").digest())
        else:
            system, path = file_system(file.url)
            total.update(system.ukey(path).encode())
    return total.hexdigest()


def _files(number: int, source: SourceConfig) -> Iterator[RecordFile]:
    for url, split in _expand(source):
        form = format_of(url) if source.format == "auto" else source.format
        places = Places.build(source.media, posixpath.dirname(url))
        yield RecordFile(url, form, split, number, places, source.task)


def _expand(source: SourceConfig) -> Iterator[tuple[str, str]]:
    """Files and their splits. A folder's files are those with a known ending, in it and in folders named by splits;
    if some are of a split by their names, then others (a dataset_info.json) are no records."""
    path = source.path if is_url(source.path) else str(Path(source.path))
    if _is_folder(path):
        found = [(url, _split_of(url)) for url in _list(path)]
        for name, split in _SPLIT_NAMES.items():
            folder = f"{path.rstrip('/')}/{name}"
            found += [(url, split) for url in (_list(folder) if _is_folder(folder) else ())]
        if source.split is None and any(split for _, split in found):
            found = [(url, split) for url, split in found if split]
    elif _is_file(path):
        found = [(path, _split_of(path))]
    elif any(mark in path for mark in "*?["):
        found = [(url, _split_of(url)) for url in _glob(path)]
    else:
        raise UsageError(f"{path}: no such file or folder")
    if not found:
        raise UsageError(f"{path}: no file of records there (.json, .jsonl, .parquet, .tar)")
    for url, split in found:
        yield url, source.split or split or "train"


def _split_of(url: str) -> str | None:
    """The split that a file's or folder's name begins with."""
    word = _WORD.match(posixpath.basename(url))
    return None if word is None else _SPLIT_NAMES.get(word.group().lower())


def _is_folder(url: str) -> bool:
    with _usage_errors(url):
        system, path = file_system(url)
        return system.isdir(path)


def _is_file(url: str) -> bool:
    with _usage_errors(url):
        system, path = file_system(url)
        return system.isfile(path)


def _list(folder: str) -> list[str]:
    """The files of records in a folder, sorted."""
    with _usage_errors(folder):
        system, path = file_system(folder)
        found = [entry["name"] for entry in system.ls(path, detail=True) if entry["type"] == "file"]
    return [url for url in _urls(found, folder) if is_record_file(url)]


def _glob(pattern: str) -> list[str]:
    with _usage_errors(pattern):
        system, path = file_system(pattern)
        return _urls(system.glob(path), pattern)


def _urls(names: list[str], like: str) -> list[str]:
    """What a file system calls its files, as paths or URLs of the same kind as ``like``, sorted."""
    scheme, mark, _ = like.partition("://")
    return [f"{scheme}://{name.lstrip('/')}" if mark and not is_url(name) else name for name in sorted(names)]


@contextmanager
def _usage_errors(url: str) -> Iterator[None]:
    """What can't be reached is a mistake in the configuration, or looks like one."""
    try:
        with os_errors(url):
            yield
    except OSError as error:
        raise UsageError(f"{url}: {reason(error)}") from None
