"""Ray Data pipeline: media files to the feature store, through frozen towers in an actor pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from unimoe_ray.config.data import DataConfig
from unimoe_ray.data.features import TOWER_OF, decode_media, encode_files
from unimoe_ray.data.media import BadMedia
from unimoe_ray.data.schema import Media
from unimoe_ray.data.store import FeatureStore, partition_dir, write_block
from unimoe_ray.errors import UnimoeError, root_cause


@dataclass(frozen=True)
class EncodeSettings:
    """What an encoding actor needs. ``load_tower`` gives the tower of a modality: image, audio or speech. Each actor
    asks for those that it needs, once."""

    root: str
    fingerprints: dict[str, str]
    frames: int
    data: DataConfig
    load_tower: Callable[[str], Any]


class EncodeBlock:
    """Actor of the pipeline: decodes, encodes and stores one block of media files of one modality."""

    def __init__(self, settings: EncodeSettings):
        import torch

        torch.set_num_threads(1)
        self.settings = settings
        self.towers: dict[str, Any] = {}

    def __call__(self, block: pa.Table) -> pa.Table:
        settings = self.settings
        modality = block["modality"][0].as_py()
        keys, reasons, decoded, good = block["key"].to_pylist(), [], [], []
        for key, paths in zip(keys, block["paths"].to_pylist(), strict=True):
            try:
                decoded.append(decode_media(Media(modality, tuple(paths)), settings.frames, settings.data))
                good.append(key)
                reasons.append("")
            except BadMedia as error:
                reasons.append(str(error))
        if good:
            stored = encode_files(self._tower(TOWER_OF[modality]), decoded)
            write_block(partition_dir(Path(settings.root), modality, settings.fingerprints[modality]), good, stored)
        return pa.table({"modality": block["modality"], "key": keys, "reason": pa.array(reasons, pa.string())})

    def _tower(self, name: str) -> Any:
        if name not in self.towers:
            self.towers[name] = self.settings.load_tower(name)
        return self.towers[name]


def encode_missing(
    media: dict[str, Media],
    settings: EncodeSettings,
    workers: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, str], int]:
    """Encode what the store lacks. ``media`` maps ``<kind>/<content key>`` to a file.

    Returns the broken files' reasons by the same keys, and how many files were encoded.
    """
    root = Path(settings.root)
    todo: dict[str, list[tuple[str, Media]]] = {}
    for kind, fingerprint in settings.fingerprints.items():
        store = FeatureStore(partition_dir(root, kind, fingerprint))
        for name, item in media.items():
            item_kind, key = name.split("/")
            if item_kind == kind and key not in store:
                todo.setdefault(kind, []).append((key, item))
    # Videos cost several images each: smaller blocks keep the actors evenly loaded and memory bounded.
    blocks = []
    for kind in sorted(todo):
        size = max(1, settings.data.encode_batch // (settings.frames if kind == "video" else 1))
        for start in range(0, len(todo[kind]), size):
            part = todo[kind][start : start + size]
            blocks.append(
                pa.table(
                    {
                        "modality": [kind] * len(part),
                        "key": [key for key, _ in part],
                        "paths": [list(item.paths) for _, item in part],
                    }
                )
            )
    if not blocks:
        return {}, 0
    total = sum(len(block) for block in blocks)
    dataset = ray.data.from_arrow(blocks).map_batches(
        EncodeBlock,
        fn_constructor_args=(settings,),
        batch_format="pyarrow",
        batch_size=None,
        compute=ActorPoolStrategy(min_size=1, max_size=max(1, min(workers, len(blocks)))),
        num_cpus=1,
    )
    broken: dict[str, str] = {}
    done = 0
    try:
        for result in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in result.to_pylist():
                if row["reason"]:
                    broken[f"{row['modality']}/{row['key']}"] = row["reason"]
            done += len(result)
            if on_progress:
                on_progress(done, total)
    except ray.exceptions.RayError as error:
        raise UnimoeError(f"encoding media failed: {root_cause(error)}") from error
    return broken, total - len(broken)
