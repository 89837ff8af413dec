"""Continuous batching: at every step requests join, are prefilled in chunks beside those that generate, and leave."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from unimoe_ray.config.serving import EngineConfig
from unimoe_ray.data.tokenizer import end_token
from unimoe_ray.inference.forward import Span, forward
from unimoe_ray.inference.kv_cache import KVArena
from unimoe_ray.inference.request import (
    KINDS,
    FinishReason,
    GenerationRequest,
    Output,
    RequestRefused,
    TokenLogprob,
)
from unimoe_ray.inference.sampling import sample, top_logprobs
from unimoe_ray.inference.sequence import Sequence
from unimoe_ray.inference.text import token_bytes
from unimoe_ray.model.language import mixtures
from unimoe_ray.model.unimoe import UniMoE


class Engine:
    """Not thread-safe but for ``start``; ``AsyncEngine`` runs it.

    Scheduling is first come, first served. Generating requests get one token each in every step; what is left of
    ``max_step_tokens`` goes to prompts, oldest first.
    """

    def __init__(self, model: UniMoE, tokenizer: Tokenizer, config: EngineConfig):
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, config
        language = model.language.config
        self.max_positions = model.max_positions
        embedding = model.language.get_input_embeddings()
        auto = config.max_running * self.max_positions
        self.arena = KVArena(
            language.num_hidden_layers,
            auto if config.kv_tokens == "auto" else config.kv_tokens,
            language.num_key_value_heads,
            language.head_dim,
            embedding.weight.dtype,
            embedding.weight.device,
        )
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        sparse = mixtures(model)
        experts = sparse[0].num_experts if sparse else 0
        # [KINDS, L, E] routed slots since the start
        self.expert_load = np.zeros((len(KINDS), len(sparse), experts), np.int64)
        self.counters = dict.fromkeys(("steps", "prompt_tokens", "generated_tokens", "finished", "cancelled"), 0)
        # Observations that a metrics exporter drains; the oldest are lost when nobody does.
        self.queue_seconds: deque[float] = deque(maxlen=4096)
        self.step_tokens: deque[int] = deque(maxlen=4096)
        self._embedding = embedding
        self._end = end_token(tokenizer)

    def start(self, request: GenerationRequest) -> Sequence:
        """A checked request, not yet waiting. Raises RequestRefused naming the part at fault."""
        language = self.model.language.config
        sequence = Sequence.start(
            request, self.tokenizer, language.hidden_size, language.vocab_size, self.max_positions
        )
        if sequence.reserved_tokens > self.arena.kv_tokens:
            raise RequestRefused(
                f"prompt and answer need {sequence.reserved_tokens} tokens of KV cache; the budget is "
                f"{self.arena.kv_tokens} (serving.engine.kv_tokens)",
                "max_completion_tokens",
            )
        return sequence

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def cancel(self, request_id: str) -> bool:
        """Frees the request's slot and cache at once; False when it is not here (any more)."""
        for sequence in [*self.running, *self.waiting]:
            if sequence.request.id == request_id:
                self._leave(sequence)
                self.counters["cancelled"] += 1
                return True
        return False

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def step(self) -> list[Output]:
        """One forward pass: an output for each request that got a token or ended."""
        self._admit()
        plan = self._plan()
        if not plan:
            return []
        inputs = [sequence.next_inputs(count, self._embedding) for sequence, count in plan]
        spans = [Span(sequence.extent.start, sequence.cached, count) for sequence, count in plan]
        hidden = forward(self.model, self.arena, torch.cat([embeddings for embeddings, _ in inputs]), spans)
        self._count_experts(plan, torch.cat([kinds for _, kinds in inputs]))
        ends = np.cumsum([count for _, count in plan]) - 1
        for sequence, count in plan:
            self.counters["prompt_tokens"] += min(count, max(0, sequence.prompt_tokens - sequence.cached))
            sequence.cached += count
        ready = [(sequence, end) for (sequence, _), end in zip(plan, ends, strict=True) if not sequence.left]
        self.counters["steps"] += 1
        self.step_tokens.append(int(ends[-1]) + 1)
        return self._sample([s for s, _ in ready], hidden[[int(end) for _, end in ready]]) if ready else []

    def stats(self) -> dict[str, Any]:
        return self.counters | {
            "running": len(self.running),
            "waiting": len(self.waiting),
            "kv_tokens": self.arena.kv_tokens,
            "kv_tokens_used": self.arena.kv_tokens - self.arena.free_tokens,
        }

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.config.max_running:
            first = self.waiting[0]
            if self.running and (first.request.alone or self.running[0].request.alone):
                return
            extent = self.arena.allocate(first.reserved_tokens)
            if extent is None:
                return
            first.extent = extent
            first.expert_load = np.zeros_like(self.expert_load)
            self.running.append(self.waiting.popleft())
            self.queue_seconds.append(time.monotonic() - first.arrived)

    def _plan(self) -> list[tuple[Sequence, int]]:
        """(sequence, how many of its tokens) of this step."""
        plan = [(sequence, 1) for sequence in self.running if sequence.left == 1]
        budget = max(1, self.config.max_step_tokens - len(plan))
        for sequence in self.running:
            if sequence.left > 1 and budget:
                count = min(sequence.left, budget)
                plan.append((sequence, count))
                budget -= count
        return plan

    @torch.inference_mode()
    def _sample(self, ready: list[Sequence], hidden: torch.Tensor) -> list[Output]:
        logits = self.model.language.get_output_embeddings()(hidden).float()
        sound = torch.isfinite(logits).all(dim=-1)
        tokens = sample(torch.where(sound[:, None], logits, 0.0), [sequence.row for sequence in ready])
        wanted = [sequence.request.params.logprobs for sequence in ready]
        most = max((k for k in wanted if k is not None), default=None)
        reported = None if most is None else top_logprobs(logits, tokens, most)
        outputs = []
        for index, (token, is_sound) in enumerate(zip(tokens.tolist(), sound.tolist(), strict=True)):
            sequence = ready[index]
            if not is_sound:
                outputs.append(self._finish(sequence, "error", error="the model's logits are not finite numbers"))
                continue
            logprobs = () if wanted[index] is None else (self._describe(token, reported[index], wanted[index]),)
            outputs.append(self._advance(sequence, token, logprobs))
        return outputs

    def _advance(self, sequence: Sequence, token: int, logprobs: tuple[TokenLogprob, ...]) -> Output:
        self.counters["generated_tokens"] += 1
        sequence.generated.append(token)
        if token == self._end:
            return self._finish(sequence, "stop", sequence.text.finish(), (token,))
        text = sequence.text.push(token)
        if sequence.text.stopped:
            return self._finish(sequence, "stop", text, (token,), logprobs)
        if len(sequence.generated) == sequence.max_new_tokens:
            return self._finish(sequence, "length", text + sequence.text.finish(), (token,), logprobs)
        return Output(sequence.request.id, text, (token,), logprobs)

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        text: str = "",
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        error: str | None = None,
    ) -> Output:
        self._leave(sequence)
        self.counters["finished"] += 1
        load = sequence.expert_load if self.expert_load.size else None
        return Output(sequence.request.id, text, tokens, logprobs, reason, error, load)

    def _leave(self, sequence: Sequence) -> None:
        if sequence.extent is None:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self.arena.release(sequence.extent)

    def _describe(self, token: int, reported: tuple[float, list[tuple[int, float]]], k: int) -> TokenLogprob:
        logprob, alternatives = reported
        top = tuple((token_bytes(self.tokenizer, other), value) for other, value in alternatives[:k])
        return TokenLogprob(token_bytes(self.tokenizer, token), logprob, top)

    def _count_experts(self, plan: list[tuple[Sequence, int]], kinds: torch.Tensor) -> None:
        """Add this pass to the load of its sequences and of the engine: one bincount over everything."""
        layers = self.model.recorder.layers
        if not layers:
            return
        chosen = torch.stack([stats.experts for stats in layers]).cpu()  # [L, T, K]
        owner = torch.repeat_interleave(torch.arange(len(plan)), torch.tensor([count for _, count in plan]))
        shape = (len(plan), *self.expert_load.shape)
        place = (owner * shape[1] + kinds)[None, :, None] * shape[2] + torch.arange(shape[2])[:, None, None]
        flat = (place * shape[3] + chosen).reshape(-1)
        load = torch.bincount(flat, minlength=int(np.prod(shape))).view(shape).numpy()
        self.expert_load += load.sum(axis=0)
        for (sequence, _), part in zip(plan, load, strict=True):
            sequence.expert_load += part
