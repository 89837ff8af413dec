"""Which worker holds which experts of the mixtures: at the start of a run, while it goes on, and at its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from typing import Any

import torch
import torch.distributed as dist

from unimoe_ray.config import Config
from unimoe_ray.model.language import mixtures
from unimoe_ray.model.moe import MoELayer
from unimoe_ray.model.routing import RoutingSums
from unimoe_ray.model.unimoe import UniMoE
from unimoe_ray.parallel import cluster_topology
from unimoe_ray.parallel.groups import Held, nearest_expert_parallel_size
from unimoe_ray.parallel.placement import replan
from unimoe_ray.parallel.placement_cost import Work, gain
from unimoe_ray.parallel.topology import Loads, Placement, contiguous
from unimoe_ray.training.engine import choose_accelerator, pick_precision


def spread_experts(model: UniMoE, config: Config, device: torch.device, placement: Sequence[Held] | None = None) -> int:
    """Drop the experts that other workers hold, as configured, and return how many workers share a mixture's experts.

    placement: to begin with, where as many workers share them as it is for; else experts lie in the order of their ids.
    Where workers were lost or have come, and ``ep_size`` does not divide their number, it is the next larger that does,
    which takes no more memory, else the next smaller.
    """
    layers, experts = len(mixtures(model)), model.config.moe.num_experts
    if not layers:
        return 1
    ranks = nearest_expert_parallel_size(config.training.expert_parallel.ep_size, dist.get_world_size(), experts)
    if ranks > 1:
        choose_accelerator(device)
        from unimoe_ray.parallel.expert_parallel import distribute

        usual = contiguous(layers, experts, ranks).layers
        distribute(model, placement if placement is not None and len(placement[0]) == ranks else usual)
    return ranks


def placement_of(model: UniMoE) -> list[Held] | None:
    """Which experts of each mixture each worker holds, None where every worker has all."""
    from unimoe_ray.parallel.expert_parallel import parallel_layers

    return [layer.held for layer in parallel_layers(model)] or None


def collect_experts(model: UniMoE) -> None:
    """All experts on rank 0 again. Called on all ranks."""
    from unimoe_ray.parallel.expert_parallel import gather

    gather(model)


class ExpertMover:
    """The engine of a run whose experts move: every ``placement.interval`` steps it plans anew, from the loads since
    the last time, and moves experts where that saves at least ``placement.min_gain``. Every rank has one and they all
    decide alike.

    ranks: that share a mixture's experts; make_engine: makes an engine around the model, at first and after a move.
    Raises UsageError when the experts do not fit into ``placement.slots``.
    """

    def __init__(self, ranks: int, config: Config, make_engine: Callable[[], Any]):
        self._ranks, self._config, self._make_engine = ranks, config, make_engine
        self._interval = config.placement.interval if ranks > 1 else 0
        self._routed: torch.Tensor | int = 0
        self._steps = 0  # that it is of
        if self._interval:
            slots = config.placement.slots_per_rank(config.model.moe.num_experts, ranks)
            everywhere = cluster_topology.gather(slots, **config.placement.link_costs()).topology
            # The first expert-parallel group speaks for the others, which hold the same.
            self._topology = replace(everywhere, nodes=everywhere.nodes[:ranks], slots=everywhere.slots[:ranks])
            contiguous(1, config.model.moe.num_experts, ranks).check(config.model.moe.num_experts, self._topology)
        self.engine = make_engine()

    def after_step(self, step: int, routing: RoutingSums) -> dict[str, Any] | None:
        """``step`` counts from 1; routing: this rank's. What was done, for ``metrics.jsonl``, if experts moved."""
        if not self._interval:
            return None
        self._routed, self._steps = self._routed + routing.routed.sum(1), self._steps + 1
        if step % self._interval:
            return None
        started = time.perf_counter()
        from unimoe_ray.parallel.expert_parallel import parallel_layers
        from unimoe_ray.parallel.relocate import moved_experts, relocate

        layers = parallel_layers(self.engine.module)
        current = Placement.of([layer.held for layer in layers])
        loads, work = self._loads(), _work(layers[0].whole, self._config, self.engine.device)
        slack = self._config.placement.slack
        new = replan(current, loads, self._topology, work, steps=self._interval, slack=slack)
        saved = gain(new, current, loads, self._topology, work, self._interval)
        idle_rank = not all(map(any, zip(*new.layers, strict=True)))  # the engine cannot express it
        if new == current or saved < self._config.placement.min_gain or idle_rank:
            return None
        self.engine = relocate(self.engine, new.layers, self._make_engine)
        return {
            "moves": [list(astuple(move)) for move in moved_experts(current.layers, new.layers)],
            "predicted_gain": round(saved, 4),
            "seconds": round(time.perf_counter() - started, 4),
        }

    def _loads(self) -> Loads:
        """Of a step, by the expert-parallel rank that the tokens were on."""
        layers, experts = self._routed.shape
        by_rank = self._routed.new_zeros(layers, self._ranks, experts)
        by_rank[:, dist.get_rank() % self._ranks] = self._routed
        dist.all_reduce(by_rank)
        steps, self._routed, self._steps = self._steps, 0, 0
        return Loads.by_rank(by_rank.cpu().numpy() / steps)


def _work(mixture: MoELayer, config: Config, device: torch.device) -> Work:
    """Of one expert as it is trained: a frozen parameter moves alone, a trained one with its moments."""
    projection = mixture.experts[0].up_proj
    values = 2 if pick_precision(config.training, device) is torch.bfloat16 else 4
    work = Work.of(projection.in_features, projection.out_features, tflops=config.placement.tflops, value_bytes=values)
    moved = sum(4 * p.numel() * (3 if p.requires_grad else 1) for p in mixture.experts[0].parameters())
    return replace(work, expert_bytes=moved)
