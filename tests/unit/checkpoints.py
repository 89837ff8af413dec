"""States of random parameters, written as the ranks of any world would, without any."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from unimoe_ray.checkpoint.manifest import KINDS, MANIFEST, Manifest, Part, part_name, tensor_name
from unimoe_ray.checkpoint.parts import write_part
from unimoe_ray.checkpoint.states import State, state_name
from unimoe_ray.checkpoint.storage import Folder

DECIDES = {"seed": 0, "stages.tune.tune.batch_size": 48, "data plan": "0" * 64}


@dataclass(frozen=True)
class World:
    """Ranks in groups of ``ep``, each of which shares the experts of every layer as ``placement`` says: [layer][rank of
    the group] ids."""

    ranks: int
    ep: int
    placement: list[list[list[int]]]

    def fragments(self, shapes: dict[str, tuple[int, ...]]) -> list[list[tuple[str, int, int]]]:
        """(parameter, start, length) of each rank, as ZeRO divides them: the parameters that a set of ranks has in
        common are laid end to end, and each rank gets an equal part, the last ones less."""
        result: list[list[tuple[str, int, int]]] = [[] for _ in range(self.ranks)]
        shared = [name for name in shapes if ".experts." not in name]
        self._divide(shared, shapes, list(range(self.ranks)), result)
        for member in range(self.ep):
            own = [name for name in shapes if ".experts." in name and self._holds(member, name)]
            self._divide(own, shapes, list(range(member, self.ranks, self.ep)), result)
        return result

    def _holds(self, member: int, name: str) -> bool:
        _, layer, _, expert, *_ = name.split(".")
        return int(expert) in self.placement[int(layer)][member]

    def _divide(self, names, shapes, ranks, result) -> None:
        total = sum(int(np.prod(shapes[name])) for name in names)
        each, at = -(-total // len(ranks)), 0
        for name in names:
            size = int(np.prod(shapes[name]))
            for number, rank in enumerate(ranks):
                low, high = max(at, number * each), min(at + size, (number + 1) * each)
                if low < high:
                    result[rank].append((name, low - at, high - low))
            at += size


def random_state(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """[3, n] of each parameter."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(3, int(np.prod(shape)), generator=generator) for name, shape in shapes.items()}


def write_state(
    folder: Folder,
    world: World,
    shapes: dict[str, tuple[int, ...]],
    values: dict[str, torch.Tensor],
    step: int,
    *,
    attempt: str = "0a1b2c",
    validation: float | None = None,
) -> State:
    where = folder / state_name(step, attempt)
    where.make()
    parts = []
    for rank, mine in enumerate(world.fragments(shapes)):
        tensors = [(tensor_name(name, kind), length) for name, _, length in mine for kind in KINDS]
        flat = [values[name][kind, start : start + length] for name, start, length in mine for kind in range(3)]
        data = torch.cat([*flat, torch.empty(0)]).numpy()
        size, digest = write_part(where, part_name(rank, world.ranks), tensors, data)
        parts.append(Part(name=part_name(rank, world.ranks), bytes=size, sha256=digest, fragments=mine))
    manifest = Manifest(
        label="tune",
        step=step,
        steps=100,
        updates=step,
        time=1764000000.0 + step,
        placement=world.placement if world.ep > 1 else None,
        validation=validation,
        decides=DECIDES,
        parameters={name: list(shape) for name, shape in shapes.items()},
        parts=parts,
    )
    where.put(MANIFEST, manifest.dump())
    return State(where, manifest)
