"""Actors that hold the experts of one replica of the language model; ``serving.language.expert_parallel``."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from unimoe_ray.config import Config
from unimoe_ray.inference.expert_group import ExpertGroup, ExpertShard, Held
from unimoe_ray.model.language import SparseFeedForward
from unimoe_ray.model.unimoe import UniMoE

logger = logging.getLogger("ray.serve")
PING_S = 20.0


class ExpertMember:
    """The actor."""

    def __init__(self, weights: str, layers: list[int], dtype: torch.dtype, threads: int):
        torch.set_num_threads(threads)
        device = "cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu"
        self._shard = ExpertShard(Path(weights), layers, dtype, device)

    def hold(self, held: Held) -> None:
        self._shard.hold(held)

    def run(self, mixture: int, rows: np.ndarray, counts: list[int]) -> np.ndarray:
        return self._shard.run(mixture, rows, counts)

    def place(self) -> tuple[str, int]:
        """Its node and process."""
        return ray.get_runtime_context().get_node_id(), os.getpid()


class RemoteMember:
    """A ``Member`` in an actor."""

    def __init__(self, actor: Any):
        self.actor = actor

    def hold(self, held: Held) -> Callable[[], None]:
        return partial(_answer, self.actor.hold.remote(held))

    def run(self, mixture: int, rows: np.ndarray, counts: list[int]) -> Callable[[], np.ndarray]:
        return partial(_answer, self.actor.run.remote(mixture, rows, counts))


def make_group(model: UniMoE, weights: Path, settings: Config, dtype: torch.dtype) -> ExpertGroup:
    """Called in a replica: starts the members in the bundles of its placement group, after its own, and has them read
    the experts, which the model loses."""
    options = settings.serving.language.expert_parallel
    layers = model.language.get_decoder().layers
    sparse = [index for index, layer in enumerate(layers) if isinstance(layer.mlp, SparseFeedForward)]
    group, threads = get_current_placement_group(), max(1, int(options.num_cpus))
    members = []
    for index in range(options.size):
        actor = ray.remote(ExpertMember).options(
            num_cpus=options.num_cpus,
            num_gpus=options.num_gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index + 1),
        )
        members.append(RemoteMember(actor.remote(str(weights), sparse, dtype, threads)))
    places = _answer([member.actor.place.remote() for member in members])
    logger.info(f"experts are held by processes {', '.join(str(pid) for _, pid in places)}")
    leader = ray.get_runtime_context().get_node_id()
    numbers = {node: number for number, node in enumerate(dict.fromkeys([leader, *(node for node, _ in places)]))}
    return ExpertGroup(
        model, members, settings.placement, options.interval, [numbers[node] for node, _ in places], leader=0
    )


def check(group: ExpertGroup) -> None:
    """Ends the replica if a member is gone, also when nobody asks anything."""
    _answer([member.actor.place.remote() for member in group.members], PING_S)


def _answer(reference: Any, timeout: float | None = None) -> Any:
    """Without one of its members a replica is of no use. It ends as if it had crashed itself: Serve starts another, and
    the ingress takes its streams there."""
    try:
        return ray.get(reference, timeout=timeout)
    except RayActorError as error:
        logger.error(f"the replica ends, as one of its experts' processes is gone: {error}")
        os._exit(1)
