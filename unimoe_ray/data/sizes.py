"""How large the feature store of some data is, told by a few of their media files."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from unimoe_ray.data.catalog import Catalog, of_kind
from unimoe_ray.data.encode import EncodeSettings
from unimoe_ray.data.features import TOWER_OF, decode_media, encode_files
from unimoe_ray.data.locations import BadMedia
from unimoe_ray.data.schema import Media
from unimoe_ray.data.store import DTYPES

SAMPLES = 8  # media files of a kind
MEASURE_S = 5.0


@dataclass(frozen=True)
class StoreSize:
    """Of the media of one kind: how many there are, how many are in the store (None: not known); windows and tokens of
    a window of one file, on average; numbers of a token; CPU seconds to encode one (None: not measured)."""

    kind: str
    media: int
    windows: float
    tokens: float
    dim: int
    there: int | None = None
    seconds: float | None = None

    def bytes(self, dtype: str) -> float:
        """Of all of them in the store."""
        return self.media * self.windows * self.tokens * self.dim * DTYPES[dtype].itemsize


def store_sizes(
    catalog: Catalog, settings: EncodeSettings, measured_tower: Callable[[str], Any] | None = None
) -> list[StoreSize]:
    """Of each kind that the catalog has; kinds of which no file of the sample can be read are left out.

    measured_tower: gives a tower for the time that encoding takes, None where there is none to measure.
    """
    load = settings.sketch_tower or settings.load_tower
    sizes = []
    for kind in sorted(settings.fingerprints):
        decoded = []
        for paths in catalog.some(kind, SAMPLES):
            try:
                decoded.append(decode_media(Media(kind, tuple(paths)), settings.frames, settings.data))
            except BadMedia:
                continue
        if not decoded:
            continue
        tower = load(TOWER_OF[kind])
        lengths = [tower.tokens_for(item) for item in decoded]
        windows = sum(map(len, lengths)) / len(lengths)
        tokens = sum(len(each) * max(each) for each in lengths) / sum(map(len, lengths))
        media = catalog.count("media", of_kind(kind))
        runs = measured_tower and measured_tower(TOWER_OF[kind])
        seconds = _seconds(runs, kind, catalog, settings) if runs else None
        sizes.append(StoreSize(kind, media, windows, tokens, tower.feature_dim, seconds=seconds))
    return sizes


def _seconds(tower: Any, kind: str, catalog: Catalog, settings: EncodeSettings) -> float | None:
    """CPU seconds for a file, decoding included; the first one, which warms up, does not count."""
    total, count, begun = 0.0, -1, time.monotonic()
    for paths in catalog.some(kind, SAMPLES + 1):
        started = time.process_time()
        try:
            encode_files(tower, [decode_media(Media(kind, tuple(paths)), settings.frames, settings.data)])
        except BadMedia:
            continue
        total, count = (total + time.process_time() - started if count >= 0 else 0.0), count + 1
        if time.monotonic() - begun > MEASURE_S and count > 0:
            break
    return total / count if count > 0 else None


def size_lines(sizes: list[StoreSize], settings: EncodeSettings, workers: int) -> list[str]:
    """The table of ``prepare --dry-run``."""
    data = settings.data
    total = {dtype: sum(size.bytes(dtype) for size in sizes) / 1e9 for dtype in DTYPES}
    shape = "of one: windows x tokens x numbers"
    lines = [
        f"feature store {settings.root}: what data.features=store would need",
        f"{'':8} {'media':>10} {'stored':>10}  {shape:36} {'GB fp16':>9} {'GB fp32':>9}  time",
    ]
    for size in sizes:
        shape = f"{size.windows:.4g} x {size.tokens:.4g} x {size.dim}"
        stored = "?" if size.there is None else str(size.there)
        clock = (
            "not measured"
            if size.seconds is None
            else _clock((size.media - (size.there or 0)) * size.seconds / workers)
        )
        gigabytes = " ".join(f"{size.bytes(dtype) / 1e9:9.3f}" for dtype in DTYPES)
        lines.append(f"{size.kind:8} {size.media:>10} {stored:>10}  {shape:36} {gigabytes}  {clock}")
    kept = total[data.store_dtype]
    fits = "within" if kept <= data.store_max_gb else "more than"
    mode = chosen(data.features, kept, data.store_max_gb)
    return [
        *lines,
        f"in all {kept:.3f} GB in {data.store_dtype}, {fits} data.store_max_gb={data.store_max_gb:g}; "
        f"data.features={data.features}: {mode}",
        f"shapes and times are those of up to {SAMPLES} files of each kind; times: {workers} workers, each on a core "
        "of this machine, no GPU",
    ]


def chosen(features: str, gigabytes: float, most: float) -> str:
    """``store`` or ``stream``."""
    if features != "auto":
        return features
    return "store" if gigabytes <= most else "stream"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
