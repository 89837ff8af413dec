"""Features made on the fly: what reads them of media that are not in the store (``data.features: stream``)."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from unimoe_ray.data.encode import EncodeSettings, MediaEncoder
from unimoe_ray.data.locations import BadMedia
from unimoe_ray.data.store import StoredFeatures
from unimoe_ray.errors import UnimoeError

CACHE_BYTES = 256 * 2**20
_PLACES = pa.schema([("name", pa.string()), ("paths", pa.list_(pa.string()))])
_PART = 65_536


@dataclass(frozen=True)
class Stream:
    """places: a file of where every media file lies (``write_places``), made with the settings that encode them."""

    places: str
    settings: EncodeSettings = field(compare=False)


def write_places(path: Path, media: Iterable[tuple[str, list[str]]]) -> None:
    """media: ``<kind>/<content key>`` and locations, sorted by name."""
    temporary = path.with_name(f".{path.name}")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, _PLACES) as file:
        part: list[tuple[str, list[str]]] = []
        for item in media:
            part.append(item)
            if len(part) == _PART:
                file.write_batch(_batch(part))
                part = []
        file.write_batch(_batch(part))
    temporary.replace(path)


def _batch(part: list[tuple[str, list[str]]]) -> pa.RecordBatch:
    names, paths = zip(*part, strict=True) if part else ((), ())
    return pa.RecordBatch.from_arrays(
        [pa.array(names, f.type) if f.name == "name" else pa.array(paths, f.type) for f in _PLACES], schema=_PLACES
    )


class Streamer:
    """Encodes media by name, those of a kind together; what was used last is kept, up to ``CACHE_BYTES``."""

    def __init__(self, stream: Stream):
        self._places = pa.ipc.open_file(pa.memory_map(stream.places)).read_all()
        self._encoder = MediaEncoder(stream.settings)
        self._kept: OrderedDict[str, StoredFeatures] = OrderedDict()
        self._bytes = 0

    def __call__(self, names: Iterable[str]) -> dict[str, StoredFeatures]:
        """Features of ``<kind>/<content key>`` each. Raises UnimoeError for one that can't be read any more."""
        wanted = list(dict.fromkeys(names))
        found = {}
        for name in wanted:
            if name in self._kept:
                self._kept.move_to_end(name)
                found[name] = self._kept[name]
        kinds: dict[str, list[str]] = {}
        for name in wanted:
            if name not in found:
                kinds.setdefault(name.partition("/")[0], []).append(name)
        for kind, missing in kinds.items():
            files = [self._paths(name) for name in missing]
            for name, item in zip(missing, self._encoder(kind, files), strict=True):
                if isinstance(item, BadMedia):
                    raise UnimoeError(f"{item}; it could be read when the data were prepared")
                found[name] = item
                self._keep(name, item)
        return found

    def _keep(self, name: str, item: StoredFeatures) -> None:
        self._kept[name] = item
        self._bytes += item.values.nbytes
        while self._bytes > CACHE_BYTES:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= oldest.values.nbytes

    def _paths(self, name: str) -> tuple[str, ...]:
        names = self._places["name"]
        row = bisect_left(range(len(names)), name, key=lambda at: names[at].as_py())
        if row == len(names) or names[row].as_py() != name:
            raise UnimoeError(f"{name} is not among the prepared media; run 'unimoe prepare' again")
        return tuple(self._places["paths"][row].as_py())


@lru_cache(maxsize=2)
def streamer(stream: Stream) -> Streamer:
    """One for each process, with its towers."""
    return Streamer(stream)
