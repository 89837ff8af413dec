"""Experts in other processes, for a model that is larger than one device.

The leader has everything else, and the KV cache; its mixtures send the rows of each expert to the member that holds it
and add up what comes back. An expert sees the same rows as in one process, so answers are the same to the bit. The
planner may give hot experts a second place; each then sees a part of the rows, and answers are the same to rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from unimoe_ray.config.placement import PlacementConfig
from unimoe_ray.errors import UsageError
from unimoe_ray.model.experts import SwiGLU, run_experts
from unimoe_ray.model.language import PROJECTIONS, SparseFeedForward
from unimoe_ray.model.moe import combine, dispatch, sort_slots
from unimoe_ray.model.routing import Routing
from unimoe_ray.model.unimoe import UniMoE
from unimoe_ray.parallel.placement import replan
from unimoe_ray.parallel.placement_cost import Work, gain
from unimoe_ray.parallel.sharing import share_out
from unimoe_ray.parallel.topology import Loads, Placement, Topology, contiguous

logger = logging.getLogger(__name__)
Held = Sequence[Sequence[int]]  # global ids of the experts of each mixture, ascending


class Member(Protocol):
    """Holds experts. A call begins; what it returns waits for the end, so that several members work at once."""

    def hold(self, held: Held) -> Callable[[], None]:
        """These experts and no others."""

    def run(self, mixture: int, rows: np.ndarray, counts: list[int]) -> Callable[[], np.ndarray]:
        """``rows`` [N, H] fp32, the first counts[0] for the first expert that it holds there and so on, to [N, H]."""


class ExpertShard:
    """A member's experts, read one by one from a model's safetensors file.

    layers: the decoder layer of each mixture
    """

    def __init__(self, weights: Path, layers: list[int], dtype: torch.dtype, device: torch.device | str = "cpu"):
        self._weights, self._layers, self._dtype, self._device = weights, layers, dtype, device
        self._experts: list[dict[int, SwiGLU]] = [{} for _ in layers]

    def hold(self, held: Held) -> None:
        with safe_open(self._weights, framework="pt") as file:
            for mixture, ids in enumerate(held):
                # What goes makes room first.
                kept = {expert: module for expert, module in self._experts[mixture].items() if expert in ids}
                self._experts[mixture] = kept
                self._experts[mixture] = {e: kept[e] if e in kept else self._read(file, mixture, e) for e in ids}

    @torch.inference_mode()
    def run(self, mixture: int, rows: np.ndarray, counts: list[int]) -> np.ndarray:
        x = torch.tensor(rows).to(self._device, self._dtype)
        return run_experts(self._experts[mixture].values(), x, counts).float().cpu().numpy()

    def _read(self, file: safe_open, mixture: int, expert: int) -> SwiGLU:
        prefix = f"language.model.layers.{self._layers[mixture]}.mlp.experts.{expert}."
        state = {
            f"{name}.weight": file.get_tensor(f"{prefix}{name}.weight").to(self._device, self._dtype)
            for name in PROJECTIONS
        }
        inner, hidden = state["up_proj.weight"].shape
        with torch.device("meta"):
            module = SwiGLU(hidden, inner)
        module.load_state_dict(state, assign=True)
        return module.requires_grad_(False)


class ExpertGroup:
    """Takes the experts out of a model and has the members hold them: first in the order of their ids, and from then on
    as the planner says, every ``interval`` steps, where the tokens routed since make it worth ``settings.min_gain``.

    nodes: of each member, any integers; leader: the leader's node. interval 0: experts stay. Raises UsageError when
    there are more members than experts, or too few slots.
    """

    def __init__(
        self,
        model: UniMoE,
        members: Sequence[Member],
        settings: PlacementConfig,
        interval: int,
        nodes: Sequence[int] | None = None,
        leader: int = 0,
    ):
        layers = model.language.get_decoder().layers
        found = [(layer, layer.mlp) for layer in layers if isinstance(layer.mlp, SparseFeedForward)]
        experts = found[0][1].num_experts if found else 0
        if not 0 < len(members) <= experts:
            raise UsageError(
                f"serving.language.expert_parallel.size is {len(members)}; the model has {experts} experts in a layer"
            )
        self.members, self._settings, self._interval = members, settings, interval
        nodes = tuple(nodes or [0] * len(members))
        slots = settings.slots_per_rank(experts, len(members))
        self._topology = Topology(nodes, (slots,) * len(members), **settings.link_costs())
        # Tokens come from the leader's node; the planner knows ranks only, so from the members there.
        near = np.array([[node == leader or leader not in nodes for node in nodes]], float)
        self._readers = near / near.sum()
        up = found[0][1].experts[0].up_proj
        self._work = Work.of(
            up.in_features, up.out_features, tflops=settings.tflops, value_bytes=up.weight.itemsize, training=False
        )
        self._routed, self._steps, self.moves = np.zeros((len(found), experts), np.int64), 0, 0
        placement = contiguous(len(found), experts, len(members))
        placement.check(experts, self._topology)
        for mixture, (layer, whole) in enumerate(found):
            layer.mlp = GroupedFeedForward(whole, self, mixture)
        self._place(placement)

    def run(self, mixture: int, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Rows [N, H] sorted by ``places``, and how many each of those has, to [N, H]."""
        sent = rows.float().cpu().numpy()
        waits, first, place = [], 0, 0
        for member, ids in zip(self.members, self.placement.layers[mixture], strict=True):
            wanted = counts[place : place + len(ids)]
            place, last = place + len(ids), first + sum(wanted)
            if last > first:
                waits.append(member.run(mixture, sent[first:last], wanted))
            first = last
        outputs = [torch.tensor(wait()) for wait in waits]
        return torch.cat(outputs).to(rows.device, rows.dtype) if outputs else rows

    def count(self, mixture: int, counts: torch.Tensor) -> None:
        """Routed slots [E] of a mixture in this step."""
        self._routed[mixture] += counts.numpy()

    def begin_step(self) -> None:
        """Between two steps experts may move."""
        if self._interval and self._steps == self._interval:
            self._replan()
        self._steps += 1

    def _replan(self) -> None:
        loads = Loads(self._routed[:, None] / self._steps, self._readers)
        self._routed[:], self._steps = 0, 0
        current, about = self.placement, (loads, self._topology, self._work)
        new = replan(current, *about, steps=self._interval, replicas=True, slack=self._settings.slack)
        saved = gain(new, current, *about, self._interval)
        if new != current and saved >= self._settings.min_gain:
            self._place(new)
            self.moves += 1
            logger.info(f"experts were placed anew: {saved:.1%} of their layers' time is to be saved")

    def _place(self, placement: Placement) -> None:
        waits = [
            member.hold(held) for member, held in zip(self.members, zip(*placement.layers, strict=True), strict=True)
        ]
        for wait in waits:
            wait()
        self.placement = placement
        self._places = [_Places.of(layer, self._routed.shape[1]) for layer in placement.layers]

    def places(self, mixture: int, experts: torch.Tensor) -> torch.Tensor:
        """Where each of these experts [T, K] is asked: [T, K] of places, counted over the members in their order."""
        return self._places[mixture].of_slots(experts)


@dataclass(frozen=True)
class _Places:
    """Of one mixture's experts. place [E, C] int64: of each expert, padded; members [E]: who holds it."""

    place: torch.Tensor
    members: list[list[int]]

    @classmethod
    def of(cls, held: Held, experts: int) -> _Places:
        """held: by each member."""
        members: list[list[int]] = [[] for _ in range(experts)]
        places: list[list[int]] = [[] for _ in range(experts)]
        for place, (member, expert) in enumerate((member, e) for member, ids in enumerate(held) for e in ids):
            members[expert].append(member)
            places[expert].append(place)
        most = max(map(len, places))
        return cls(torch.tensor([own + [0] * (most - len(own)) for own in places]), members)

    def of_slots(self, experts: torch.Tensor) -> torch.Tensor:
        """The rows of an expert with several places are shared out anew in each step."""
        place, most = self.place.to(experts.device), self.place.shape[1]
        if most == 1:
            return place[experts, 0]
        order, counts = sort_slots(experts, len(place))
        shares = [share + [0] * (most - len(share)) for share in share_out(counts.tolist(), self.members)]
        up_to = torch.tensor(shares, device=order.device).cumsum(1)[:, :-1]
        expert = experts.reshape(-1)[order]
        rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[expert]
        chosen = place[expert, (rank[:, None] >= up_to[expert]).sum(dim=1)]
        return torch.empty_like(chosen).scatter_(0, order, chosen).view_as(experts)


class GroupedFeedForward(SparseFeedForward):
    """A mixture whose experts a group holds."""

    def __init__(self, whole: SparseFeedForward, group: ExpertGroup, mixture: int):
        nn.Module.__init__(self)
        self.num_experts, self.top_k, self.recorder = whole.num_experts, whole.top_k, whole.recorder
        self.gate, self.experts = whole.gate, nn.ModuleList()
        self._group, self._mixture = group, mixture
        self.train(whole.training)

    def mix(self, tokens: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
        group = self._group
        if self._mixture == 0:
            group.begin_step()
        places = group.places(self._mixture, routing.experts)
        order, at_place = sort_slots(places, sum(map(len, group.placement.layers[self._mixture])))
        outputs = group.run(self._mixture, dispatch(tokens, order, self.top_k), at_place.tolist())
        counts = torch.bincount(routing.experts.reshape(-1), minlength=self.num_experts)
        group.count(self._mixture, counts.cpu())
        return combine(outputs, order, routing.weights), counts
