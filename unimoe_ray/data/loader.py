"""Ray Data delivers each rank's planned micro-batches, in order and ahead of use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset

from unimoe_ray.data.batch import Arrays, collate, from_bytes, to_bytes
from unimoe_ray.data.plan import Mixture, split_step, step_samples
from unimoe_ray.data.samples import PreparedSample, SampleTable, Source
from unimoe_ray.data.store import FeatureStore, StoredFeatures
from unimoe_ray.data.stream import Stream, streamer


@dataclass(frozen=True)
class Step:
    """One optimizer step of one rank: its micro-batches, samples in them, and seconds spent waiting for the data."""

    number: int
    micro_batches: list[Arrays]
    samples: int


def planned_micro_batches(
    source: Source, mixture: Mixture, *, steps: int, batch_size: int, seed: int, rank: int, world: int, max_tokens: int
) -> list[list[np.ndarray]]:
    """[step][micro] sample indices of one rank. Every rank computes the same plan and keeps its part."""
    table = _table(source.samples)
    plan = []
    for samples in step_samples(mixture, steps, batch_size, seed):
        ranks = split_step(samples, table.lengths[samples], table.groups[samples], world, max_tokens)
        plan.append(ranks[rank])
    return plan


def rank_dataset(source: Source, plan: list[list[np.ndarray]], steps_per_block: int) -> Dataset:
    """A Ray Dataset of one rank's micro-batches: planned ids in, safetensors bytes out, order preserved."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    blocks = []
    for first in range(0, len(plan), steps_per_block):
        rows = [
            {"step": step, "samples": micro.tolist()}
            for step in range(first, min(first + steps_per_block, len(plan)))
            for micro in plan[step]
        ]
        blocks.append(pa.Table.from_pylist(rows, schema=_PLANNED))
    return ray.data.from_arrow(blocks).map_batches(
        **({"fn": collate_planned} if source.stream is None else stream_actors(source.stream)),
        fn_kwargs={"source": source},
        batch_format="pyarrow",
        batch_size=None,
        zero_copy_batch=True,
        num_cpus=0.5,
    )


def iterate_steps(dataset: Dataset, prefetch_blocks: int) -> Iterator[Step]:
    """Steps of a rank, in order, from its Ray Data iterator."""
    number, micro_batches, samples = 0, [], 0
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=prefetch_blocks):
        for row in range(len(table)):
            step = table["step"][row].as_py()
            if step != number:
                yield Step(number, micro_batches, samples)
                number, micro_batches, samples = step, [], 0
            micro_batches.append(from_bytes(table["payload"][row].as_py()))
            samples += int(micro_batches[-1]["mask"].any(axis=1).sum())
    yield Step(number, micro_batches, samples)


def collate_planned(block: pa.Table, source: Source) -> pa.Table:
    """One block of planned micro-batches to their bytes; runs in a Ray Data task."""
    table = _table(source.samples)
    payloads = []
    for rows in block["samples"].to_pylist():
        samples = [table.get(row) for row in rows]
        payloads.append(to_bytes(collate(samples, features_of(source, samples))))
    return pa.table({"step": block["step"], "payload": pa.array(payloads, pa.large_binary())})


def features_of(source: Source, samples: list[PreparedSample]) -> Callable[[str], StoredFeatures]:
    """What ``collate`` reads the features of these samples with."""
    if source.stream is None:
        return partial(read_features, source)
    return streamer(source.stream)(name for sample in samples for name in sample.media).__getitem__


class StreamedCollate:
    """``collate_planned`` in an actor, whose process keeps the towers."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)

    def __call__(self, block: pa.Table, **planned: Any) -> pa.Table:
        return collate_planned(block, **planned)


def stream_actors(stream: Stream) -> dict[str, Any]:
    """For ``map_batches``: the pool of actors that encode and collate for one rank."""
    data = stream.settings.data
    pool = ActorPoolStrategy(min_size=1, max_size=data.stream_actors)
    return {"fn": StreamedCollate, "compute": pool, "num_gpus": data.stream_gpus or None}


def read_features(source: Source, name: str) -> StoredFeatures:
    """Features of ``<kind>/<content key>``."""
    if source.stream is not None:
        return streamer(source.stream)([name])[name]
    kind, key = name.split("/")
    return _store(source.partitions[kind]).get(key)


_PLANNED = pa.schema([("step", pa.int64()), ("samples", pa.list_(pa.int64()))])


@lru_cache(maxsize=4)
def _table(path: str) -> SampleTable:
    return SampleTable(Path(path))


@lru_cache(maxsize=16)
def _store(folder: str) -> FeatureStore:
    return FeatureStore(Path(folder))
