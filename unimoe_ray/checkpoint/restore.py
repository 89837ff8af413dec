"""Finds the last good state of a run and brings it into the engine, whatever world wrote it."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from unimoe_ray.checkpoint.manifest import KINDS, tensor_name
from unimoe_ray.checkpoint.parts import tensor_places
from unimoe_ray.checkpoint.states import State, check_same_run, damages, newest_first
from unimoe_ray.checkpoint.storage import Folder
from unimoe_ray.data.locations import reason
from unimoe_ray.errors import UnimoeError
from unimoe_ray.parallel.state import fragments, set_updates_done, trained_parameters

log = logging.getLogger(__name__)

# Reads of a file that lie this near are one; one read brings at most so much at a time. Bytes.
GAP, BLOCK = 2**16, 2**25


def find(folder: Folder, decides: dict[str, Any]) -> tuple[State | None, list[str]]:
    """The newest state that is whole, and for each that was passed over a line naming the file and the reason. Called
    on all ranks, which share the work of checking it and get the same.

    Raises UsageError if that is of a run with other settings, UnimoeError where the storage can't be read.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    candidates = newest_first(folder)  # rank 0's alone are looked at
    warnings: list[str] = []
    while True:
        found = _from_rank_zero(lambda: next(candidates, None))
        if found is None:
            return None, warnings
        if isinstance(found, State):
            check_same_run(found, decides)
            wrong = _everywhere(found, slice(rank, None, world))
            if not wrong:
                return found, warnings
            where, why = found.folder, "; ".join(wrong)
        else:
            where, why = found
        warnings.append(f"{where.location} was passed over: {why}")
        if rank == 0:
            log.warning("%s", warnings[-1])


def _from_rank_zero(ask: Callable[[], Any]) -> Any:
    """What rank 0 finds out, on all ranks; its errors too."""
    said: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            said = [ask(), None]
        except UnimoeError as error:
            said = [None, error]
        except OSError as error:
            said = [None, UnimoeError(f"states can't be read: {reason(error)}")]
    dist.broadcast_object_list(said)
    if said[1] is not None:
        raise said[1]
    return said[0]


def _everywhere(state: State, parts: slice) -> list[str]:
    """``damages`` of a rank's share, of all ranks."""
    try:
        mine: list[str] | UnimoeError = damages(state, parts)
    except OSError as error:
        mine = UnimoeError(f"{state.folder.location}: {reason(error)}")
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, mine)
    for one in said:
        if isinstance(one, UnimoeError):
            raise one
    return [damage for one in said for damage in one]


@torch.no_grad()
def load(engine, state: State) -> None:
    """Bring a state that ``find`` found into an engine, between two updates. No communication: a rank reads the weights
    of all parameters that it has and the moments of what it updates.

    Raises UnimoeError where the state is not that of the engine's parameters.
    """
    wanted: list[Wanted] = []
    parameters = dict(trained_parameters(engine))
    for name, parameter in parameters.items():
        shape = state.manifest.parameters.get(name)
        if shape != list(parameter.shape):
            raise UnimoeError(
                f"{state.folder.location}: {name} is {shape or 'missing'}, the model's is {list(parameter.shape)}"
            )
        wanted.append(Wanted(name, KINDS[0], 0, parameter.detach().view(-1)))
    for fragment in fragments(engine):
        wanted += [
            Wanted(fragment.name, kind, fragment.start, tensor)
            for kind, tensor in zip(KINDS, fragment.tensors(), strict=True)
        ]
    read(state, wanted)
    set_updates_done(engine, state.manifest.updates)


@dataclass(frozen=True)
class Wanted:
    """values [n]: to be filled with what ``kind`` of ``KINDS`` has of a flattened parameter from ``start`` on."""

    parameter: str
    kind: str
    start: int
    values: torch.Tensor


def read(state: State, wanted: list[Wanted]) -> None:
    """Fill tensors from the parts that have them, each part once, in the order of the file, and only what is needed of
    it. The state's manifest has all that is wanted."""
    index = _index(state)
    by_part: dict[int, list[tuple[str, int, torch.Tensor]]] = defaultdict(list)  # tensor, first value in it, values
    for want in wanted:
        for part, skip, values in _pieces(index[want.parameter], want):
            by_part[part].append((tensor_name(want.parameter, want.kind), skip, values))
    for number, pieces in sorted(by_part.items()):
        part = state.manifest.parts[number]
        try:
            places = tensor_places(state.folder, part.name)
            _fill(state.folder, part.name, [(places[key][0] + 4 * skip, values) for key, skip, values in pieces])
        except (OSError, ValueError, KeyError) as error:
            why = reason(error) if isinstance(error, OSError) else f"does not have what the manifest says ({error})"
            raise UnimoeError(f"{state.folder.location}/{part.name}: {why}") from None


def _index(state: State) -> dict[str, list[tuple[int, int, int]]]:
    """{parameter: (first value, number of values, part) in order}."""
    index: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for number, part in enumerate(state.manifest.parts):
        for name, start, length in part.fragments:
            if length:
                index[name].append((start, length, number))
    for places in index.values():
        places.sort()
    return index


def _pieces(places: list[tuple[int, int, int]], want: Wanted) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(part, first value in its fragment, values) that together are all that is wanted."""
    stop = want.start + len(want.values)
    first = bisect_right(places, want.start, key=lambda place: place[0]) - 1
    for start, length, part in places[max(first, 0) :]:
        low, high = max(start, want.start), min(start + length, stop)
        if start >= stop:
            break
        if low < high:
            yield part, low - start, want.values[low - want.start : high - want.start]


def _fill(folder: Folder, name: str, pieces: list[tuple[int, torch.Tensor]]) -> None:
    """(first byte in the file, values) each."""
    for block in _blocks(sorted(_cut(pieces), key=lambda piece: piece[0])):
        first = block[0][0]
        data = folder.read(name, first, max(start + 4 * len(values) for start, values in block))
        for start, values in block:
            values.copy_(torch.from_numpy(np.frombuffer(data, np.float32, len(values), start - first).copy()))


def _cut(pieces: list[tuple[int, torch.Tensor]]) -> Iterator[tuple[int, torch.Tensor]]:
    """No piece longer than a block."""
    longest = BLOCK // 4
    for start, values in pieces:
        for first in range(0, len(values), longest):
            yield start + 4 * first, values[first : first + longest]


def _blocks(pieces: Sequence[tuple[int, torch.Tensor]]) -> Iterator[list[tuple[int, torch.Tensor]]]:
    """Neighbours together, in order."""
    block: list[tuple[int, torch.Tensor]] = []
    stop = 0
    for start, values in pieces:
        end = start + 4 * len(values)
        if block and (start > stop + GAP or end - block[0][0] > BLOCK):
            yield block
            block = []
        block.append((start, values))
        stop = max(stop, end) if len(block) > 1 else end
    if block:
        yield block
