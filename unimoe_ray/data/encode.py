"""Ray Data pipeline: media files to the feature store, through frozen towers in an actor pool."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from unimoe_ray.config.data import DataConfig
from unimoe_ray.data.catalog import NOT_HELD_OUT, UNMARKED, Catalog, of_kind
from unimoe_ray.data.claims import LEASE_S, claim, claimed, locked
from unimoe_ray.data.features import TOWER_OF, decode_media, encode_windows
from unimoe_ray.data.gather import Progress
from unimoe_ray.data.media import BadMedia
from unimoe_ray.data.schema import Media
from unimoe_ray.data.store import (
    DTYPES,
    StoredFeatures,
    blocks,
    mend,
    open_block,
    partition_dir,
    stored_lengths,
    write_block,
)
from unimoe_ray.errors import UnimoeError, root_cause

PASS_FILES = 32  # media files that go through a tower together: what is decoded at a time
RUN_BLOCKS = 1024  # blocks that one run of the pipeline is given: Ray Data keeps notes on each
SoftTokens = Callable[[str, list[int]], int]

_TODO = pa.schema([("modality", pa.string()), ("key", pa.string()), ("paths", pa.list_(pa.string()))])
_RESULT = pa.schema([*list(_TODO)[:2], ("lengths", pa.list_(pa.int32())), ("reason", pa.string())])


@dataclass(frozen=True)
class EncodeSettings:
    """What an encoding actor needs. ``load_tower`` gives the tower of a modality: image, audio or speech. Each actor
    asks for those that it needs, once. ``sketch_tower``: the same without weights, where those are not needed;
    threads: decoders of an actor; gpu: whether an actor has one."""

    root: str
    fingerprints: dict[str, str]
    frames: int
    data: DataConfig
    load_tower: Callable[[str], Any]
    sketch_tower: Callable[[str], Any] | None = None
    threads: int = 1
    gpu: bool = False

    def partition(self, kind: str) -> Path:
        return partition_dir(Path(self.root), kind, self.fingerprints[kind], self.data.store_dtype)


@dataclass
class MediaEncoder:
    """Decodes and encodes media files with towers that are loaded once."""

    settings: EncodeSettings
    towers: dict[str, Any] = field(default_factory=dict)

    def __call__(self, kind: str, files: list[tuple[str, ...]]) -> Iterator[StoredFeatures | BadMedia]:
        """The features of each file of one kind in order, or why it can't be used."""
        tower, dtype = self._tower(TOWER_OF[kind]), DTYPES[self.settings.data.store_dtype]

        def read(paths: tuple[str, ...]) -> np.ndarray | BadMedia:
            try:
                return tower.preprocess(decode_media(Media(kind, paths), self.settings.frames, self.settings.data))
            except BadMedia as error:
                return error

        threads = self.settings.threads
        with ThreadPoolExecutor(threads) as pool:
            windows = (pool.map if threads > 1 else map)(read, files)
            while part := list(islice(windows, PASS_FILES)):
                features = iter(encode_windows(tower, [w for w in part if not isinstance(w, BadMedia)], dtype))
                yield from (item if isinstance(item, BadMedia) else next(features) for item in part)

    def _tower(self, name: str) -> Any:
        if name not in self.towers:
            tower = self.settings.load_tower(name)
            self.towers[name] = tower.to("cuda") if self.settings.gpu else tower
        return self.towers[name]


class EncodeBlock:
    """Actor of the pipeline: encodes and stores one block of media files of one modality at a time.

    ``todo``: the file of blocks; ``job`` and ``since``: who asks, and when it last looked what the store has.
    """

    def __init__(self, settings: EncodeSettings, todo: str, job: str, since: dict[str, float]):
        import torch

        torch.set_num_threads(1)
        self.settings, self.job, self.since = settings, job, since
        self.todo = pa.ipc.open_file(pa.memory_map(todo))
        self.encoder = MediaEncoder(settings)
        self.seen: dict[str, set[str]] = {}  # keys of other jobs' new blocks, by file

    def __call__(self, numbers: pa.Table) -> pa.Table:
        return pa.concat_tables(self._encode(self.todo.get_batch(n)) for n in numbers["block"].to_pylist())

    def _encode(self, block: pa.RecordBatch) -> pa.Table:
        kind, keys = block["modality"][0].as_py(), block["key"].to_pylist()
        paths = dict(zip(keys, block["paths"].to_pylist(), strict=True))
        folder = self.settings.partition(kind)
        good: dict[str, StoredFeatures] = {}
        reasons: dict[str, str] = {}
        with claim(folder, keys) as mine:
            there = self._of_other_jobs(folder, kind)
            mine = [key for key in mine if key not in there]
            for key, item in zip(mine, self.encoder(kind, [tuple(paths[key]) for key in mine]), strict=True):
                if isinstance(item, BadMedia):
                    reasons[key] = str(item)
                else:
                    good[key] = item
            if good:
                write_block(folder, list(good), list(good.values()), self.job)
        lengths = [good[key].lengths if key in good else None for key in keys]
        return _results(kind, keys, lengths, [reasons.get(key) for key in keys])

    def _of_other_jobs(self, folder: Path, kind: str) -> set[str]:
        """Keys that were stored since this job looked, by another one."""
        for path in blocks(folder):
            with suppress(FileNotFoundError):  # another job mends the folder
                if path.name not in self.seen and path.stat().st_mtime >= self.since[kind]:
                    table = open_block(path)
                    own = (table.schema.metadata or {}).get(b"writer") == self.job.encode()
                    self.seen[path.name] = set() if own else set(table["key"].to_pylist())
        return set().union(*self.seen.values())


class CountBlock:
    """Actor of the pipeline: decodes one block of media files at a time, and counts the tokens of their windows."""

    def __init__(self, settings: EncodeSettings, todo: str):
        self.settings = settings
        self.todo = pa.ipc.open_file(pa.memory_map(todo))
        self.tower = cache(settings.sketch_tower or settings.load_tower)

    def __call__(self, numbers: pa.Table) -> pa.Table:
        return pa.concat_tables(self._count(self.todo.get_batch(n)) for n in numbers["block"].to_pylist())

    def _count(self, block: pa.RecordBatch) -> pa.Table:
        kind, lengths, reasons = block["modality"][0].as_py(), [], []
        for paths in block["paths"].to_pylist():
            found, why = None, None
            try:
                decoded = decode_media(Media(kind, tuple(paths)), self.settings.frames, self.settings.data)
                found = self.tower(TOWER_OF[kind]).tokens_for(decoded)
            except BadMedia as error:
                why = str(error)
            lengths.append(found)
            reasons.append(why)
        return _results(kind, block["key"].to_pylist(), lengths, reasons)


def _results(kind: str, keys: list[str], lengths: list[list[int] | None], reasons: list[str | None]) -> pa.Table:
    columns = [[kind] * len(keys), keys, lengths, reasons]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, _RESULT, strict=True)], schema=_RESULT)


def count_tokens(
    catalog: Catalog,
    settings: EncodeSettings,
    soft_tokens: SoftTokens,
    workers: int,
    scratch: Path,
    on_progress: Progress,
) -> None:
    """Note in the catalog how many soft tokens each file becomes that only the train split has, or its fault, without
    encoding it: what is streamed. ``scratch``: a file for what is to be done. Raises UnimoeError."""
    settings = replace(settings, gpu=False, threads=1)
    kinds = sorted(settings.fingerprints)
    which = f"{UNMARKED} AND {NOT_HELD_OUT}"
    if total := catalog.count("media", which):
        count = write_todo(catalog, kinds, settings, scratch, which)
        results = run_actors(CountBlock, (settings, str(scratch.resolve())), settings, count, workers)
        _mark(catalog, results, soft_tokens, partial(on_progress, "decoding media"), total)
        scratch.unlink()


def encode_missing(
    catalog: Catalog,
    settings: EncodeSettings,
    soft_tokens: SoftTokens,
    workers: int,
    scratch: Path,
    on_progress: Progress,
    say: Callable[[str], None],
) -> int:
    """Encode the media that are not marked in the catalog and not in the store, and note how many soft tokens each
    becomes, or its fault. What another job is encoding is left to it. ``scratch``: a file for what is to be done.

    Returns how many files were encoded. Memory does not grow with their number. Raises UnimoeError.
    """
    folders = {kind: settings.partition(kind) for kind in sorted(settings.fingerprints)}
    for folder in folders.values():
        mend(folder, say)
    job, known, encoded, waiting = uuid4().hex, set(), 0, False
    while True:
        since = _note_stored(catalog, folders, soft_tokens, known)
        if not (total := sum(catalog.count("media", f"{UNMARKED} AND {of_kind(kind)}") for kind in folders)):
            return encoded
        if _left_to_others(catalog, folders):
            if not waiting:
                say(f"another job is encoding the {total} media files that are missing: waiting for it")
            waiting = True
            time.sleep(1)
            continue
        waiting = False
        count = write_todo(catalog, folders, settings, scratch)
        results = run_actors(EncodeBlock, (settings, str(scratch.resolve()), job, since), settings, count, workers)
        encoded += _mark(catalog, results, soft_tokens, partial(on_progress, "encoding media"), total)
        scratch.unlink()


def _mark(
    catalog: Catalog,
    results: Iterator[pa.Table],
    soft_tokens: SoftTokens,
    on_progress: Callable[[int, int], None],
    total: int,
) -> int:
    """Note the actors' results in the catalog. Returns how many files had no fault and were not left to others."""
    sound, done = 0, 0
    for result in results:
        for row in result.to_pylist():
            name = f"{row['modality']}/{row['key']}"
            if row["reason"] is not None:
                catalog.mark(name, None, row["reason"])
            elif row["lengths"] is not None:
                catalog.mark(name, soft_tokens(row["modality"], row["lengths"]), None)
                sound += 1
        done += len(result)
        on_progress(done, total)
    return sound


def _note_stored(
    catalog: Catalog, folders: dict[str, Path], soft_tokens: SoftTokens, known: set[Path]
) -> dict[str, float]:
    """Note the tokens of what lies in blocks that are not ``known`` yet, which they then are.

    Returns, by kind, a time of the file system: what is written later was not seen.
    """
    since = {}
    for kind, folder in folders.items():
        with locked(folder) as now:
            since[kind] = now - LEASE_S  # a block may have been written a while before it gets its name
        new = [path for path in blocks(folder) if path not in known]
        for key, lengths in stored_lengths(new):
            catalog.mark(f"{kind}/{key}", soft_tokens(kind, lengths), None)
        known.update(new)
    return since


def _left_to_others(catalog: Catalog, folders: dict[str, Path]) -> bool:
    """Whether living jobs have claimed all that is missing."""
    for kind, folder in folders.items():
        with locked(folder) as now:
            others = claimed(folder, now)
        if any(key not in others for page in catalog.find(kind, UNMARKED) for key, _ in page):
            return False
    return True


def write_todo(
    catalog: Catalog, kinds: Iterable[str], settings: EncodeSettings, path: Path, which: str = UNMARKED
) -> int:
    """A record batch for each block of media that the actors are given. Returns how many."""
    count = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _TODO) as file:
        for kind in kinds:
            # Videos cost several images each: smaller blocks keep the actors evenly loaded and memory bounded.
            size = max(1, settings.data.encode_batch // (settings.frames if kind == "video" else 1))
            for page in catalog.find(kind, which, size):
                keys, paths = zip(*page, strict=True)
                columns = [pa.array([kind] * len(page)), pa.array(keys), pa.array(paths, pa.list_(pa.string()))]
                file.write_batch(pa.RecordBatch.from_arrays(columns, schema=_TODO))
                count += 1
    return count


def run_actors(actor: type, arguments: tuple, settings: EncodeSettings, count: int, workers: int) -> Iterator[pa.Table]:
    """What a pool of actors makes of the numbers of ``count`` blocks, as it comes."""
    for first in range(0, count, RUN_BLOCKS):
        numbers = range(first, min(first + RUN_BLOCKS, count))
        dataset = ray.data.from_arrow([pa.table({"block": [number]}) for number in numbers]).map_batches(
            actor,
            fn_constructor_args=arguments,
            batch_format="pyarrow",
            batch_size=None,
            compute=ActorPoolStrategy(min_size=1, max_size=max(1, min(workers, len(numbers)))),
            num_cpus=settings.threads,
            num_gpus=1 if settings.gpu else None,
        )
        try:
            yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        except ray.exceptions.RayError as error:
            raise UnimoeError(f"encoding media failed: {root_cause(error)}") from error
