"""Continuous batching: at every step requests join, are prefilled in chunks beside those that generate, and leave."""

from __future__ import annotations

import bisect
import time
from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from unimoe_ray.config.serving import EngineConfig
from unimoe_ray.data.tokenizer import end_token
from unimoe_ray.inference.forward import Span
from unimoe_ray.inference.kv_cache import Extent, KVArena
from unimoe_ray.inference.native import make_decoder
from unimoe_ray.inference.prefixes import SHORTEST, PrefixCache
from unimoe_ray.inference.request import (
    KINDS,
    FinishReason,
    GenerationRequest,
    Output,
    RequestRefused,
    TokenLogprob,
)
from unimoe_ray.inference.sampling import likeliest, sample, top_logprobs
from unimoe_ray.inference.sequence import Sequence, embed_next
from unimoe_ray.inference.text import token_bytes
from unimoe_ray.model.language import mixtures
from unimoe_ray.model.unimoe import UniMoE


class Engine:
    """Not thread-safe but for ``start``; ``AsyncEngine`` runs it.

    Scheduling is first come, first served among those of one priority. Generating requests get one token each in every
    step; what is left of ``max_step_tokens`` goes to prompts, oldest first, then to guesses (``lookup_tokens``). What
    sequences leave in the cache stays as long as nobody needs the room: a prompt that begins like one of them, or like
    one that runs, goes on from there.

    keep_weights: False when nobody else needs the model; its layers may then be emptied. Raises KernelUnavailable where
    int8 is wanted in vain.
    """

    def __init__(self, model: UniMoE, tokenizer: Tokenizer, config: EngineConfig, keep_weights: bool = True):
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
        self.decoder = make_decoder(model, self.arena, config.precision == "int8", keep_weights)
        self.prefixes = PrefixCache()
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        sparse = mixtures(model)
        experts = sparse[0].num_experts if sparse else 0
        # [KINDS, L, E] routed slots since the start
        self.expert_load = np.zeros((len(KINDS), len(sparse), experts), np.int64)
        self._slots = (len(sparse), sparse[0].top_k if sparse else 1)
        counted = ("steps", "prompt_tokens", "reused_tokens", "generated_tokens", "drafted_tokens", "accepted_tokens")
        self.counters = dict.fromkeys((*counted, "finished", "cancelled"), 0)
        # Observations that a metrics exporter drains; the oldest are lost when nobody does.
        self.queue_seconds: deque[float] = deque(maxlen=4096)
        self.step_tokens: deque[int] = deque(maxlen=4096)
        self._table = embedding.weight.detach()
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
        bisect.insort(self.waiting, sequence, key=lambda other: -other.request.priority)

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
        ends = np.cumsum([count for _, count in plan]).tolist()
        spans = [Span(sequence.extent.start, sequence.cached, count) for sequence, count in plan]
        ready, wanted = [], []
        for (sequence, count), end in zip(plan, ends, strict=True):
            if sequence.left + len(sequence.draft) == count:
                ready.append(sequence)
                wanted += range(end - 1 - len(sequence.draft), end)
        embeddings = embed_next(plan, self._table)
        logits, chosen = self.decoder(embeddings, spans, wanted)
        routed = chosen.numpy().swapaxes(0, 1)  # [T, L, K]
        for (sequence, count), end in zip(plan, ends, strict=True):
            first, last = sequence.cached, sequence.cached + count
            sequence.experts[first:last] = routed[end - count : end]
            self.counters["prompt_tokens"] += min(count, max(0, sequence.prompt_tokens - first))
            sequence.cached = last
        self.counters["steps"] += 1
        self.step_tokens.append(ends[-1])
        return self._sample(ready, logits) if ready else []

    def stats(self) -> dict[str, Any]:
        return self.counters | {
            "running": len(self.running),
            "waiting": len(self.waiting),
            "kv_tokens": self.arena.kv_tokens,
            "kv_tokens_used": sum(sequence.reserved_tokens for sequence in self.running),
        }

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.config.max_running:
            first = self.waiting[0]
            if self.running and self.running[-1].on_trial:
                return
            first.extent = self._find_room(first.reserved_tokens)
            if first.extent is None:
                return
            first.experts = np.zeros((first.reserved_tokens, *self._slots), np.uint16)
            self._reuse(first)
            self.running.append(self.waiting.popleft())
            self.queue_seconds.append(time.monotonic() - first.arrived)

    def _find_room(self, size: int) -> Extent | None:
        while (extent := self.arena.allocate(size)) is None and len(self.prefixes):
            self.arena.release(self.prefixes.drop_oldest())
        return extent

    def _reuse(self, sequence: Sequence) -> None:
        """Copy what is in the cache of the longest common beginning; the prompt's last token is always fed."""
        keys = sequence.keys[:-1]
        found = [(prefix.common(keys), prefix) for prefix in (other.prefix() for other in self.running)]
        if (kept := self.prefixes.find(keys)) is not None:
            found.append(kept)
        length, prefix = max(found, key=lambda pair: pair[0], default=(0, None))
        if length < SHORTEST:
            return
        self.arena.copy(prefix.extent.start, sequence.extent.start, length)
        sequence.experts[:length] = prefix.experts[:length]
        sequence.cached = sequence.reused = length
        self.counters["reused_tokens"] += length

    def _plan(self) -> list[tuple[Sequence, int]]:
        """(sequence, how many of its tokens) of this step."""
        # Nobody joins while one is on trial: it came last. The others pause.
        running = self.running[-1:] if self.running and self.running[-1].on_trial else self.running
        plan = [(sequence, 1) for sequence in running if sequence.left == 1]
        budget = max(1, self.config.max_step_tokens - len(plan))
        for sequence in running:
            if sequence.left > 1 and budget:
                count = min(sequence.left, budget)
                plan.append((sequence, count))
                budget -= count
        if not self.config.lookup_tokens:
            return plan
        # Guesses take what prompts leave.
        budget = self.config.max_step_tokens - sum(count for _, count in plan)
        for index, (sequence, count) in enumerate(plan):
            if sequence.left == 1 == count and budget > 0:
                drafted = sequence.look_up(min(self.config.lookup_tokens, budget))
                plan[index] = (sequence, 1 + drafted)
                budget -= drafted
        return plan

    @torch.inference_mode()
    def _sample(self, ready: list[Sequence], logits: torch.Tensor) -> list[Output]:
        """``logits``: of the next token of each and of those after its draft, end to end."""
        tokens = likeliest(logits)
        sound = torch.isfinite(logits.gather(1, tokens[:, None])[:, 0])
        if not all(sequence.takes_the_likeliest for sequence in ready):
            rows = [row for sequence in ready for row in sequence.rows()]
            tokens = sample(torch.where(sound[:, None], logits, 0.0), rows)
        most = max((k for s in ready if (k := s.request.params.logprobs) is not None), default=None)
        reported = None if most is None else top_logprobs(logits, tokens, most)
        found = list(zip(tokens.tolist(), sound.tolist(), reported or [None] * len(tokens), strict=True))
        outputs, first = [], 0
        for sequence in ready:
            last = first + len(sequence.draft) + 1
            outputs.append(self._accept(sequence, found[first:last]))
            first = last
        return outputs

    def _accept(self, sequence: Sequence, found: list[tuple[int, bool, Any]]) -> Output:
        """The next token, and those after it as long as the draft was right. ``found``: of each place the token,
        whether its logits are sound, and what ``top_logprobs`` says of it."""
        draft, sequence.draft = sequence.draft, []
        k = sequence.request.params.logprobs
        parts: list[Output] = []
        for place, (token, is_sound, reported) in enumerate(found):
            # Of a wrong draft's tokens nothing is kept; the last token is not fed yet.
            sequence.cached = sequence.prompt_tokens + len(sequence.generated)
            if not is_sound:
                parts.append(self._finish(sequence, "error", error="the model's logits are not finite numbers"))
                break
            logprobs = () if k is None else (self._describe(token, reported, k),)
            parts.append(self._advance(sequence, token, logprobs))
            if parts[-1].finish_reason is not None or [token] != draft[place : place + 1]:
                break
        accepted = len(parts) - 1
        self.counters["drafted_tokens"] += len(draft)
        self.counters["accepted_tokens"] += accepted
        if draft:
            sequence.learn(accepted)
        return parts[0] if not accepted else _joined(parts)

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
        load = self._load(sequence) if self.expert_load.size else None
        return Output(sequence.request.id, text, tokens, logprobs, reason, error, load)

    def _leave(self, sequence: Sequence) -> None:
        if sequence.extent is None:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self.expert_load += self._load(sequence, sequence.reused)
        extent, kept = sequence.extent, sequence.cached if sequence.cached >= SHORTEST else 0
        if kept:
            self.prefixes.keep(sequence.prefix())
        if extent.size > kept:
            self.arena.release(Extent(extent.start + kept, extent.size - kept))

    def _describe(self, token: int, reported: tuple[float, list[tuple[int, float]]], k: int) -> TokenLogprob:
        logprob, alternatives = reported
        top = tuple((token_bytes(self.tokenizer, other), value) for other, value in alternatives[:k])
        return TokenLogprob(token_bytes(self.tokenizer, token), logprob, top)

    def _load(self, sequence: Sequence, first: int = 0) -> np.ndarray:
        """Routed slots [KINDS, L, E] of its tokens from the ``first`` on."""
        shape = self.expert_load.shape
        place = sequence.all_kinds()[first:, None] * shape[1] + np.arange(shape[1])
        flat = place[..., None] * shape[2] + sequence.experts[first : sequence.cached]
        return np.bincount(flat.ravel(), minlength=self.expert_load.size).reshape(shape)


def _joined(parts: list[Output]) -> Output:
    """Outputs of one request, in order, as one."""
    return replace(
        parts[-1],
        text="".join(part.text for part in parts),
        token_ids=tuple(token for part in parts for token in part.token_ids),
        logprobs=tuple(logprob for part in parts for logprob in part.logprobs),
    )
