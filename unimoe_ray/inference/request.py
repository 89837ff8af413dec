"""What an engine is asked and what it answers. Light to import: no torch.

A second backend (vLLM, say) implements ``Backend``: everything above it works on these types alone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from unimoe_ray.config.model import TOKEN_KINDS

FinishReason = Literal["stop", "length", "error"]
# What a token of the sequence was made from; generated tokens are ``answer``.
KINDS = (*TOKEN_KINDS, "answer")


class RequestRefused(Exception):
    """A request that this engine can't take. ``param`` names the part at fault; the message is one line."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message, param)
        self.message, self.param = message, param

    def __str__(self) -> str:
        return self.message


class EngineBusy(RequestRefused):
    """The engine has as many waiting requests as it may have: try again later."""


class EngineOverloaded(Exception):
    """A new request would wait for a slot for longer than it may. wait_s, max_wait_s: the estimate and the bound."""

    def __init__(self, wait_s: float, max_wait_s: float):
        super().__init__(wait_s, max_wait_s)
        self.wait_s, self.max_wait_s = wait_s, max_wait_s


class EngineStopped(RuntimeError):
    """The engine no longer runs, and will not run again."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. ``temperature`` 0 is greedy. ``max_new_tokens`` None: as many as the context has room for.

    seed: the same seed, prompt and parameters give the same tokens; None draws one per request
    stop: the answer ends before the first of these strings
    logprobs: number of alternatives to report per token (0: the chosen token only); None: none
    frequency_penalty, presence_penalty: subtracted from the logits of tokens already generated, per occurrence or once
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0


@dataclass(frozen=True)
class GenerationRequest:
    """ids: the prompt, text ids and one placeholder id per media file; soft_tokens: [M, H] of each file, in order.

    trial: it is suspected of having crashed a replica, so for so many tokens it runs with nothing else in the step:
    if it crashes again, there is one culprit.
    generated: what another engine has given out of the answer already; only what follows is given out here, and it is
    what would have followed there.
    priority: of those that wait for a slot, the higher goes first, then the older
    """

    id: str
    ids: list[int]
    soft_tokens: list[np.ndarray] = field(default_factory=list)
    params: SamplingParams = SamplingParams()
    trial: int = 0
    generated: tuple[int, ...] = ()
    priority: int = 0


@dataclass(frozen=True)
class TokenLogprob:
    """A token as bytes, its natural-log probability, and the likeliest alternatives at its place, best first."""

    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True)
class Output:
    """One step of one request, or some in a row. ``text`` is whole characters, possibly none yet.

    token_ids: tokens generated in them (the end token included)
    finish_reason: None while it goes on; ``error`` with the reason in ``error``
    expert_load: with the last output of a mixture, routed slots per kind, sparse layer and expert: [KINDS, L, E] int64
    """

    request_id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    expert_load: np.ndarray | None = None


@dataclass(frozen=True)
class Admitted:
    """A request that the engine will answer. prompt_tokens: spliced length, media included; waits: others may have to
    end first."""

    prompt_tokens: int
    max_new_tokens: int
    waits: bool = True


class Backend(Protocol):
    """An asynchronous engine."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[Admitted | Output]:
        """``Admitted``, then outputs, the last one with a finish reason. Closing the iterator early frees the request's
        slot before the next step. Raises RequestRefused naming the part at fault, EngineBusy when too many wait,
        EngineOverloaded when it would wait too long, EngineStopped when the engine ends before the answer."""

    def stats(self) -> dict[str, Any]:
        """Gauges and counters since the start, JSON."""

    def check(self) -> None:
        """Raises EngineStopped when the engine no longer runs."""

    def close(self) -> None: ...
