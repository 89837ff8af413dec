"""Ray Data delivers each rank's planned micro-batches, in order and ahead of use."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset
from ray.data._internal.execution.execution_callback import ExecutionCallback

from unimoe_ray.data.batch import Arrays, collate, from_bytes, samples_in, to_bytes
from unimoe_ray.data.layout import split_step
from unimoe_ray.data.plan import Order, Plan
from unimoe_ray.data.samples import PreparedSample, SampleTable, Source, Span
from unimoe_ray.data.store import FeatureStore, StoredFeatures
from unimoe_ray.data.stream import Stream, streamer

# Blocks of one Ray Dataset: more take longer to start, about 2 ms each.
SEGMENT = 256
# Seconds from one round of Ray Data's scheduling to the next, at least.
ROUND_S = 0.02


@dataclass(frozen=True)
class Step:
    """One optimizer step of one rank: its micro-batches, samples in them, and seconds spent waiting for the data."""

    number: int
    micro_batches: list[Arrays]
    samples: int


@dataclass(frozen=True)
class Layout:
    """How a step's samples are laid out: one rank's part of them, in micro-batches of at most ``max_tokens``, in rows
    of one sample each, or of several with up to ``row_tokens``."""

    rank: int
    world: int
    max_tokens: int
    row_tokens: int = 0


def total_steps(source: Source, order: Order) -> int:
    return _planned(source.samples, source.spans, order)[1].steps


def planned_micro_batches(
    source: Source, order: Order, layout: Layout, steps: Iterable[int]
) -> Iterator[list[np.ndarray]]:
    """Sample indices [micro] of one rank, for each of ``steps``. Every rank plans the same and keeps its part; a step's
    cost depends on its own samples only, wherever the first of ``steps`` is."""
    table, plan = _planned(source.samples, source.spans, order)
    for step in steps:
        samples = plan.samples(step)
        lengths, groups = table.lengths[samples], table.groups[samples]
        ranks = split_step(samples, lengths, groups, layout.world, layout.max_tokens, layout.row_tokens)
        yield ranks[layout.rank]


@dataclass
class RankDataset:
    """Micro-batches of one rank, as Ray Datasets of ``SEGMENT`` blocks one after the other: Ray Data's start takes time
    and memory in proportion to blocks, and a run may have millions. Each is started when the one before it is half
    through, so that only the first is waited for.

    segments: steps of each; dataset: makes one of steps
    """

    segments: list[range]
    dataset: Callable[[range], Dataset]
    started: Dataset | None = None

    def tables(self, prefetch_blocks: int) -> Iterator[pa.Table]:
        """Blocks in order, ``prefetch_blocks`` of them fetched ahead."""
        with ThreadPoolExecutor(1) as starter:
            ahead = [starter.submit(self._start, steps, prefetch_blocks) for steps in self.segments[:1]]
            for number, steps in enumerate(self.segments):
                blocks = ahead.pop().result()
                following = self.segments[number + 1 : number + 2]
                for table in blocks:
                    yield table
                    if following and table["step"][-1].as_py() >= steps[len(steps) // 2]:
                        ahead.append(starter.submit(self._start, following.pop(), prefetch_blocks))

    def stats(self) -> str:
        """Ray Data's own, of the last dataset that was started."""
        return self.started.stats()

    def _start(self, steps: range, prefetch_blocks: int) -> Iterator[pa.Table]:
        """Runs until the first block is there."""
        self.started = self.dataset(steps)
        how = {"batch_size": None, "batch_format": "pyarrow", "prefetch_batches": prefetch_blocks}
        blocks = iter(self.started.iter_batches(**how))
        return chain([next(blocks)], blocks)


def rank_dataset(
    source: Source,
    order: Order,
    layout: Layout,
    steps_per_block: int,
    first_step: int = 0,
    runtime_env: dict[str, Any] | None = None,
) -> RankDataset:
    """One rank's micro-batches from ``first_step`` on: numbers of steps in, planned where they are collated,
    safetensors bytes out, order preserved. runtime_env: of the processes that collate."""
    total, size = total_steps(source, order), SEGMENT * steps_per_block
    segments = [range(start, min(start + size, total)) for start in range(first_step, total, size)]
    return RankDataset(segments, partial(_dataset, source, order, layout, steps_per_block, runtime_env))


def _dataset(
    source: Source,
    order: Order,
    layout: Layout,
    steps_per_block: int,
    runtime_env: dict[str, Any] | None,
    steps: range,
) -> Dataset:
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.custom_execution_callback_classes = [Paced]
    # Made in this process, while from_arrow asks for tasks, whose processes would be waited for at every start.
    blocks = -(-len(steps) // steps_per_block)
    numbers = ray.data.from_items([{"step": step} for step in steps], override_num_blocks=blocks)
    return numbers.map_batches(
        **({"fn": collate_planned} if source.stream is None else stream_actors(source.stream)),
        fn_kwargs={"source": source, "order": order, "layout": layout},
        batch_format="pyarrow",
        batch_size=None,
        zero_copy_batch=True,
        num_cpus=0.5,
        runtime_env=runtime_env,
    )


class Paced(ExecutionCallback):
    """Between rounds of scheduling Ray Data waits for its tasks. When none runs because output is held back, nothing
    slows it: its thread would take half a core from the training beside it."""

    def __init__(self) -> None:
        self.last = 0.0

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(max(0.0, self.last + ROUND_S - time.monotonic()))
        self.last = time.monotonic()


def iterate_steps(dataset: RankDataset, prefetch_blocks: int) -> Iterator[Step]:
    """Steps of a rank, in order."""
    number, micro_batches, samples = None, [], 0
    for table in dataset.tables(prefetch_blocks):
        for row in range(len(table)):
            step = table["step"][row].as_py()
            if step != number:
                if number is not None:
                    yield Step(number, micro_batches, samples)
                number, micro_batches, samples = step, [], 0
            micro_batches.append(from_bytes(table["payload"][row].as_py()))
            samples += samples_in(micro_batches[-1])
    if number is not None:
        yield Step(number, micro_batches, samples)


def collate_planned(block: pa.Table, source: Source, order: Order, layout: Layout) -> pa.Table:
    """One block of steps to the bytes of their micro-batches; runs in a Ray Data task."""
    table = _table(source.samples)
    steps = block["step"].to_pylist()
    numbers, payloads = [], []
    for step, micro_batches in zip(steps, planned_micro_batches(source, order, layout, steps), strict=True):
        for rows in micro_batches:
            prepared = [table.get(int(row)) for row in rows]
            arrays = collate(prepared, features_of(source, prepared), row_tokens=layout.row_tokens)
            payloads.append(to_bytes(arrays))
            numbers.append(step)
    return pa.table({"step": pa.array(numbers, pa.int64()), "payload": pa.array(payloads, pa.large_binary())})


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


@lru_cache(maxsize=4)
def _table(path: str) -> SampleTable:
    return SampleTable(Path(path))


@lru_cache(maxsize=4)
def _planned(path: str, spans: tuple[Span, ...], order: Order) -> tuple[SampleTable, Plan]:
    table = _table(path)
    return table, order.plan(table, spans)


@lru_cache(maxsize=16)
def _store(folder: str) -> FeatureStore:
    return FeatureStore(Path(folder))
