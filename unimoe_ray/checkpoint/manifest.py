"""What commits a state: where it stands, of which run it is, and the size and checksum of every file."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

MANIFEST = "manifest.json"
MAX_BYTES = 2**28
# The tensors of a fragment: the optimizer's fp32 weight and Adam's moments.
KINDS = ("param", "exp_avg", "exp_avg_sq")

Name = Annotated[str, Field(min_length=1, max_length=1000)]
Count = Annotated[int, Field(ge=0)]


class DamagedError(Exception):
    """A state that can't be used, with the file and the reason in one line."""


class UncommittedError(DamagedError):
    """One that was never finished, or is being written."""


class Part(BaseModel):
    """A rank's file. fragments: (parameter, first value, number of values) in the flattened parameter."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(pattern=r"^part-\d{5,}-of-\d{5,}\.safetensors$")
    bytes: Count
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    fragments: list[tuple[Name, Count, Count]]


class Manifest(BaseModel):
    """Of one state.

    label: stage/run; step: optimizer steps done, which is also how far the data plan was used and where the schedule
    stands; updates: Adam's step; placement: [layer][rank] global ids of experts, None when every rank has all;
    validation: mean loss over groups, if there was a validation at this step; decides: all that decides what the run
    learns, as JSON values by their keys; parameters: shape of each trained one
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1] = 1
    label: str
    step: Annotated[int, Field(ge=1)]
    steps: int
    updates: Count
    time: float
    placement: list[list[list[Count]]] | None
    validation: float | None
    decides: dict[str, Any]
    parameters: dict[Name, list[Count]]
    parts: list[Part]

    @property
    def world(self) -> int:
        return len(self.parts)

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @model_validator(mode="after")
    def _is_whole(self) -> Manifest:
        if [part.name for part in self.parts] != [part_name(rank, self.world) for rank in range(self.world)]:
            raise ValueError("parts are not those of ranks 0, 1, ...")
        covered = dict.fromkeys(self.parameters, 0)
        for name, start, length in sorted(fragment for part in self.parts for fragment in part.fragments):
            if covered.get(name) != start:
                raise ValueError(f"fragments of {name} do not fit together")
            covered[name] += length
        for name, shape in self.parameters.items():
            if covered[name] != _size(shape):
                raise ValueError(f"{name} is not whole")
        for ranks in self.placement or []:
            held = sorted(expert for ids in ranks for expert in ids)
            if held != list(range(len(held))) or len(ranks) != len(self.placement[0]):
                raise ValueError("the placement does not hold every expert once")
        return self

    def dump(self) -> bytes:
        """Canonical: ``load`` accepts these bytes only."""
        body = self.model_dump(mode="json")
        return _canonical({"sha256": hashlib.sha256(_canonical(body)).hexdigest(), "state": body})


def load(data: bytes) -> Manifest:
    """Raises DamagedError for what ``dump`` did not write."""
    try:
        outer = json.loads(data)
        body = outer["state"]
        whole = _canonical(outer) == data and outer["sha256"] == hashlib.sha256(_canonical(body)).hexdigest()
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DamagedError(f"{MANIFEST} is not one, or its end is missing") from None
    if not whole:
        raise DamagedError(f"{MANIFEST} does not match its checksum")
    try:
        return Manifest.model_validate_json(_canonical(body))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise DamagedError(f"{MANIFEST} is of no version known here ({key or 'state'}: {first['msg']})") from None


def part_name(rank: int, world: int) -> str:
    return f"part-{rank:05d}-of-{world:05d}.safetensors"


def tensor_name(parameter: str, kind: str) -> str:
    """In a part."""
    return f"{parameter}/{kind}"


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _size(shape: list[int]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size
