"""A mixture whose experts are spread over ranks, on DeepSpeed's engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups as deepspeed_groups
from torch import nn

from unimoe_ray.model.experts import run_experts
from unimoe_ray.model.language import SparseFeedForward, mixtures
from unimoe_ray.model.moe import combine, dispatch, sort_slots
from unimoe_ray.model.routing import Routing
from unimoe_ray.parallel.dispatch import announce, deliver, give_back
from unimoe_ray.parallel.groups import Held, tag_expert, untag_expert
from unimoe_ray.parallel.transfer import Message, clear_storage, exchange, make_storage


class ExpertParallelFeedForward(SparseFeedForward):
    """A ``SparseFeedForward`` that holds some of the experts; the ranks of its expert-parallel group have the others.

    It computes what the whole layer computes. State-dict names carry global ids: ``experts.{global id}.*``. Ranks are
    grouped as DeepSpeed does it: ranks 0 to R-1 are the first expert-parallel group, and so on.

    whole: the local layer that it takes the place of. It keeps every expert, but the parameters of those held
    elsewhere have no storage.
    """

    def __init__(self, whole: SparseFeedForward, held: Held):
        nn.Module.__init__(self)
        self.num_experts, self.top_k, self.recorder = whole.num_experts, whole.top_k, whole.recorder
        self.ep_size, self.expert_group_name = len(held), f"ep_size_{len(held)}"
        self.gate = whole.gate
        self._whole = (whole,)  # not a submodule
        self.ep_group: dist.ProcessGroup | None = None
        for expert in whole.experts:
            tag_expert(expert, self.expert_group_name)
        self.hold(held)
        self.train(whole.training)

    @property
    def whole(self) -> SparseFeedForward:
        return self._whole[0]

    @property
    def num_local_experts(self) -> int:
        return len(self.experts)

    def hold(self, held: Held) -> None:
        """Take the experts of another placement, whose parameters have storage now, and free that of the others."""
        if sorted(expert for ids in held for expert in ids) != list(range(self.num_experts)):
            raise ValueError(f"{held} does not hold each of {self.num_experts} experts once")
        self.held, mine = held, held[dist.get_rank() % self.ep_size]
        self.experts = nn.ModuleDict({str(expert): self.whole.experts[expert] for expert in mine})
        self.experts.train(self.training)
        for number, expert in enumerate(self.whole.experts):
            if number not in mine:
                clear_storage(expert)
        position = torch.tensor([expert for ids in held for expert in ids]).argsort()
        self.register_buffer("position", position.to(self.gate.weight.device), persistent=False)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by the engine, once process groups can be made."""
        if self.expert_group_name not in deepspeed_groups._get_expert_parallel_group_dict():
            deepspeed_groups._create_expert_and_data_parallel(
                self.ep_size, use_data_before_expert_parallel_=use_data_before_expert_parallel_
            )
        self.ep_group = deepspeed_groups._get_expert_parallel_group(self.expert_group_name)

    def mix(self, tokens: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
        order, counts = sort_slots(self.position[routing.experts], self.num_experts)
        announced = announce(counts, [len(ids) for ids in self.held], self.ep_group)
        rows = dispatch(tokens, order, self.top_k)
        if torch.is_autocast_enabled(rows.device.type):  # the experts would cast them after the journey
            rows = rows.to(torch.get_autocast_dtype(rows.device.type))
        traffic = announced()
        outputs = deliver(rows, traffic)
        if self.experts:
            outputs = run_experts(self.experts.values(), outputs, traffic.counts, traffic.send_gradients)
        return combine(give_back(outputs, traffic), order, routing.weights), counts[self.position]


class TrainedExpertParallelFeedForward(ExpertParallelFeedForward, MoE):
    """One whose experts are trained. Being DeepSpeed's ``MoE`` tells the engine that ranks have different parameters,
    and it refuses such a model when they are all frozen."""


def distribute(model: nn.Module, placement: Sequence[Held]) -> None:
    """Make every mixture of a model expert-parallel and drop the experts that this rank does not hold.

    placement: of each mixture, first layer first. Every rank starts with all experts, and the parameters keep their
    identity. Raises ValueError when a rank would have no expert in any layer: the engine cannot express it.
    """
    if not all(any(ids) for ids in zip(*placement, strict=True)):
        raise ValueError(f"{placement} leaves a rank without experts")
    _replace(model, {layer: _parallel(layer, held) for layer, held in zip(mixtures(model), placement, strict=True)})


def _parallel(layer: SparseFeedForward, held: Held) -> ExpertParallelFeedForward:
    trained = any(parameter.requires_grad for parameter in layer.experts.parameters())
    return (TrainedExpertParallelFeedForward if trained else ExpertParallelFeedForward)(layer, held)


def gather(model: nn.Module) -> None:
    """Undo ``distribute`` on rank 0, which gets every expert from the ranks that hold it. The other ranks' models are
    left as they are. Call it on all ranks; an engine around the model is of no use afterwards."""
    layers = parallel_layers(model)
    for layer in layers:
        owners = {expert: rank for rank, ids in enumerate(layer.held) for expert in ids if rank}
        experts = {expert: layer.whole.experts[expert] for expert in owners}
        if dist.get_rank() == 0:
            for expert in experts.values():
                make_storage(expert)
        tensors = {expert: [p.data for p in module.parameters()] for expert, module in experts.items()}
        exchange([Message(owner, 0, tensors[expert]) for expert, owner in owners.items()])
    if dist.get_rank() == 0:
        for layer in layers:
            for expert in layer.whole.experts:
                untag_expert(expert)
            layer.whole.train(layer.training)
        _replace(model, {layer: layer.whole for layer in layers})


def parallel_layers(model: nn.Module) -> list[ExpertParallelFeedForward]:
    """The expert-parallel mixtures of a model, first layer first."""
    return [layer for layer in mixtures(model) if isinstance(layer, ExpertParallelFeedForward)]


def _replace(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in replacements:
                setattr(parent, name, replacements[child])
