"""What preparing the configured data would take: media, bytes of the feature store, time. Nothing is written, nothing
downloaded; every record and media file is read, a few are decoded and encoded."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from unimoe_ray import cluster
from unimoe_ray.config import Config
from unimoe_ray.config.model import MODALITIES, PUBLISHED_TOWERS
from unimoe_ray.data.catalog import Catalog, of_kind
from unimoe_ray.data.encode import EncodeSettings
from unimoe_ray.data.features import TOWER_OF
from unimoe_ray.data.gather import read_into
from unimoe_ray.data.sizes import size_lines, store_sizes
from unimoe_ray.data.sources import absolute, record_files, sources_of
from unimoe_ray.data.store import blocks, stored_lengths
from unimoe_ray.errors import UnimoeError
from unimoe_ray.mini import source as mini
from unimoe_ray.pipeline import fingerprint
from unimoe_ray.progress import TrainProgress
from unimoe_ray.towers import load_tower, sketch_tower


def store_table(config: Config) -> list[str]:
    """Lines for people. Where something is missing, a line says what."""
    suite = mini.suite_dir(config).resolve() if config.data.is_mini else None
    if suite is not None and not (suite / "suite.json").is_file():
        return ["the data of the embedded default are made by the first 'unimoe prepare': nothing to count yet"]
    settings = EncodeSettings(
        root=str(Path(config.data.dir).resolve() / "features"),
        fingerprints=dict.fromkeys(MODALITIES, ""),
        frames=config.model.video.frames,
        data=config.data,
        load_tower=partial(load_tower, config),
        sketch_tower=partial(sketch_tower, config),
    )
    try:
        files = record_files(sources_of(absolute(config.data), suite))
        with (
            tempfile.TemporaryDirectory() as scratch,
            Catalog(Path(scratch) / "catalog.sqlite", config.data.max_bytes) as catalog,
            TrainProgress(Console(stderr=True)) as progress,
        ):
            records = read_into(catalog, files, config, progress.count)
            sizes = store_sizes(catalog, settings, partial(_measured, config))
            sizes = [replace(size, there=_there(config, settings, catalog, size.kind)) for size in sizes]
            head = f"{records} records, {catalog.count('media')} media files, {catalog.count('bad')} records unusable"
        return [head, *size_lines(sizes, settings, cluster.local_workers(config))]
    except UnimoeError as error:
        return [f"nothing to count: {error}"]


def _measured(config: Config, modality: str) -> Any | None:
    """A tower that runs as fast as the configured one."""
    chosen = getattr(config.model.towers, modality)
    if chosen.name not in PUBLISHED_TOWERS:
        return sketch_tower(config, modality)  # random weights, but weights
    return load_tower(config, modality) if Path(chosen.path).exists() else None


def _there(config: Config, settings: EncodeSettings, catalog: Catalog, kind: str) -> int | None:
    """How many of the catalog's media of a kind are in the store; None if that takes weights that are not here."""
    if not (Path(settings.root) / kind).is_dir():
        return 0
    chosen = getattr(config.model.towers, TOWER_OF[kind])
    if chosen.name in PUBLISHED_TOWERS and not Path(chosen.path).exists():
        return None
    tower = load_tower(config, TOWER_OF[kind])
    partition = replace(settings, fingerprints={kind: fingerprint(config, kind, tower.fingerprint())}).partition(kind)
    for key, _ in stored_lengths(blocks(partition)):
        catalog.mark(f"{kind}/{key}", 0, None)
    return catalog.count("media", f"tokens IS NOT NULL AND {of_kind(kind)}")
