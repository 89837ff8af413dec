"""Which experts a token goes to, and what that says about the router: statistics, balance loss and z-loss.

Uni-MoE, section 3.2 (equations 14 and 15), as the released 4-expert code computes it: softmax over the k selected
logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch.nn import functional as F

from unimoe_ray.model.compiled import route_few_tokens


@dataclass
class Routing:
    """The choices of T tokens.

    experts [T, K] int64, best first; weights [T, K]: ``mixing_weights``; logits [T, E]: of the router, in fp32 or finer
    """

    experts: torch.Tensor
    weights: torch.Tensor
    logits: torch.Tensor


def route(tokens: torch.Tensor, gate: torch.Tensor, top_k: int) -> Routing:
    """``tokens`` [T, H] by a router ``gate`` [E, H]."""
    few = route_few_tokens(tokens, gate, top_k)
    if few is not None:
        return Routing(*few)
    with torch.autocast(tokens.device.type, enabled=False):  # it would route in bf16
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        logits = F.linear(tokens.to(dtype), gate.to(dtype))
    top_logits, experts = logits.topk(top_k, dim=-1)
    return Routing(experts, mixing_weights(top_logits), logits)


def mixing_weights(top_logits: torch.Tensor) -> torch.Tensor:
    """Softmax of the chosen logits [T, K], best first. Two weights add up to 1 exactly, not to rounding: experts that
    agree, as those of a freshly upcycled model do, are then mixed to what they say, bit for bit (``moe.combine``)."""
    if top_logits.shape[-1] != 2:
        return top_logits.softmax(dim=-1)
    first = 1 - top_logits.softmax(dim=-1)[..., 1:]  # at least a half: its difference to 1 has no rounding
    return torch.cat((first, 1 - first), dim=-1)


@dataclass
class RoutingSums:
    """Statistics of a router as sums over tokens, so that those of several batches, layers or ranks add up. G kinds of
    token (text and the modalities); every field may have leading dims, of layers.

    tokens      [G]    how many
    routed      [G, E] slots (each token fills K)
    first       [G, E] tokens whose best expert it is
    probability [G, E] softmax over all experts; differentiable
    z           [G]    squared logsumexp of the logits; differentiable
    entropy     [G]    of the softmax, in nats
    """

    tokens: torch.Tensor
    routed: torch.Tensor
    first: torch.Tensor
    probability: torch.Tensor
    z: torch.Tensor
    entropy: torch.Tensor

    def tensors(self) -> list[torch.Tensor]:
        return [getattr(self, f.name) for f in fields(self)]

    def __add__(self, other: RoutingSums) -> RoutingSums:
        return RoutingSums(*(a + b for a, b in zip(self.tensors(), other.tensors(), strict=True)))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> RoutingSums:
        return RoutingSums(*map(function, self.tensors()))

    def over_kinds(self) -> RoutingSums:
        """All tokens as one kind, G = 1."""
        return RoutingSums(
            self.tokens.sum(-1, keepdim=True),
            *(t.sum(-2, keepdim=True) for t in (self.routed, self.first, self.probability)),
            *(t.sum(-1, keepdim=True) for t in (self.z, self.entropy)),
        )

    @staticmethod
    def stack(layers: list[RoutingSums]) -> RoutingSums:
        return RoutingSums(*map(torch.stack, zip(*(layer.tensors() for layer in layers), strict=True)))


def routing_sums(routing: Routing, kinds: torch.Tensor | None = None, num_kinds: int = 1) -> RoutingSums:
    """``kinds`` [T] int64: the kind of each token, below ``num_kinds``; without it all are of kind 0."""
    logits, experts = routing.logits, routing.experts
    tokens, count = logits.shape
    if kinds is None:
        kinds = experts.new_zeros(tokens)
    log_z = logits.logsumexp(dim=-1)
    log_p = logits - log_z.unsqueeze(-1)
    probability = log_p.exp()

    def by_kind(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(num_kinds, *values.shape[1:]).index_add(0, kinds, values)

    def slots(chosen: torch.Tensor) -> torch.Tensor:
        place = kinds.unsqueeze(-1) * count + chosen
        return torch.bincount(place.reshape(-1), minlength=num_kinds * count).view(num_kinds, count)

    with torch.no_grad():
        entropy = by_kind(-(probability * log_p).sum(dim=-1))
    return RoutingSums(
        tokens=torch.bincount(kinds, minlength=num_kinds),
        routed=slots(experts),
        first=slots(experts[:, :1]),
        probability=by_kind(probability),
        z=by_kind(log_z.square()),
        entropy=entropy,
    )


def balance_loss(sums: RoutingSums, share: str = "all", per: str = "batch") -> torch.Tensor:
    """E * sum_e(mean probability_e * share_e), [...] of sums [..., G, E]; 1 when balanced, 0 without tokens.

    share: of the T*K routed slots (``all``), or of the T first choices (``first``: Switch Transformer, equation 4, as
        the released 8-expert code has it)
    per: ``batch`` balances all tokens together; ``modality`` each kind of token by itself, and the result is the mean
        over tokens of their kind's loss
    """
    if per == "batch":
        sums = sums.over_kinds()
    counts = sums.routed if share == "all" else sums.first
    tokens = sums.tokens.to(sums.probability.dtype)
    mean = sums.probability / tokens.clamp(min=1).unsqueeze(-1)
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    of_kind = counts.shape[-1] * (mean * shares).sum(-1)
    return (of_kind * tokens).sum(-1) / tokens.sum(-1).clamp(min=1)


def z_loss(sums: RoutingSums) -> torch.Tensor:
    """Mean over tokens of the squared logsumexp of the router's logits (ST-MoE, arXiv 2202.08906, equation 5), [...] of
    sums [..., G, E]."""
    return sums.z.sum(-1) / sums.tokens.sum(-1).clamp(min=1)


@dataclass
class RoutingStats:
    """What the router did with one batch of T tokens; all but the counts is computed when asked for.

    routing: the choices of each token; tokens_per_expert [E] int64: routed slots; kinds [T] int64 or None
    """

    routing: Routing
    tokens_per_expert: torch.Tensor
    kinds: torch.Tensor | None = None
    num_kinds: int = 1

    @property
    def experts(self) -> torch.Tensor:
        """[T, K] int64: chosen experts of each token, best first."""
        return self.routing.experts

    @cached_property
    def sums(self) -> RoutingSums:
        return routing_sums(self.routing, self.kinds, self.num_kinds)

    @property
    def mean_probability(self) -> torch.Tensor:
        """[E]: mean over tokens of the softmax over all experts; zeros without tokens."""
        whole = self.sums.over_kinds()
        return whole.probability[0] / whole.tokens.clamp(min=1)

    @property
    def balance_loss(self) -> torch.Tensor:
        """Scalar; see ``balance_loss``."""
        return balance_loss(self.sums)
