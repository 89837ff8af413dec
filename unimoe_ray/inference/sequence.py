"""A request on its way through the engine."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from tokenizers import Tokenizer

from unimoe_ray.config.model import PLACEHOLDER_IDS
from unimoe_ray.inference.kv_cache import Extent
from unimoe_ray.inference.lookup import propose
from unimoe_ray.inference.prefixes import Prefix, content_keys
from unimoe_ray.inference.request import KINDS, GenerationRequest, RequestRefused
from unimoe_ray.inference.sampling import GREEDY_BELOW, Row
from unimoe_ray.inference.text import TextStream

LONGEST_PAUSE = 15
ANSWER = KINDS.index("answer")
_KIND_OF_PLACEHOLDER = {placeholder: KINDS.index(kind) for kind, placeholder in PLACEHOLDER_IDS.items()}


@dataclass
class Sequence:
    """ids [S] int64: the spliced prompt, 0 at soft tokens; soft: (first row, values [M, H]) of each file; kinds [S]:
    index into KINDS; keys [S] int64: what each token is, for ``Prefix``. ``cached``: tokens whose keys and values are
    in the arena, of which ``reused`` were copied there; experts [reserved, L, K]: where they were routed. draft: tokens
    that are fed in this step to see whether they follow."""

    request: GenerationRequest
    ids: np.ndarray
    soft: list[tuple[int, torch.Tensor]]
    kinds: np.ndarray
    keys: np.ndarray
    max_new_tokens: int
    seed: int
    text: TextStream
    extent: Extent | None = None
    cached: int = 0
    reused: int = 0
    generated: list[int] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    _guess: int = 1  # tokens to try next,
    _pause: int = 0  # after so many without,
    _misses: int = 0  # and after so many more the time after
    arrived: float = field(default_factory=time.monotonic)
    experts: np.ndarray | None = None

    @classmethod
    def start(
        cls, request: GenerationRequest, tokenizer: Tokenizer, hidden_size: int, vocab_size: int, max_positions: int
    ) -> Sequence:
        """Checks everything that the forward pass relies on. Raises RequestRefused."""
        ids, kinds, soft = _splice(request, hidden_size, vocab_size)
        array = np.array(ids, np.int64)
        keys = array.copy()
        for begin, values in soft:
            keys[begin : begin + len(values)] = content_keys(values.numpy())
        params = request.params
        room = max_positions - len(ids)
        if room < 1:
            raise RequestRefused(
                f"the prompt has {len(ids)} tokens, media included; the model takes at most {max_positions - 1}",
                "messages",
            )
        wanted = room if params.max_new_tokens is None else params.max_new_tokens
        if wanted > room:
            raise RequestRefused(
                f"{wanted} new tokens are asked for, but after a prompt of {len(ids)} tokens, media included, "
                f"{room} fit (the context is {max_positions})",
                "max_completion_tokens",
            )
        seed = secrets.randbits(63) if params.seed is None else params.seed
        text, generated = TextStream(tokenizer, params.stop), list(request.generated)
        if len(generated) >= wanted or not all(0 <= token < vocab_size for token in generated):
            raise RequestRefused(f"{len(generated)} tokens of an answer of {wanted}: nothing to go on with", "messages")
        for token in generated:
            text.push(token)
        return cls(request, array, soft, np.array(kinds), keys, wanted, seed, text, generated=generated)

    @property
    def prompt_tokens(self) -> int:
        return len(self.ids)

    @property
    def reserved_tokens(self) -> int:
        """The last token generated is never fed back."""
        return self.prompt_tokens + self.max_new_tokens - 1

    @property
    def left(self) -> int:
        """Tokens to feed before the next one can be sampled."""
        return self.prompt_tokens + len(self.generated) - self.cached

    @property
    def on_trial(self) -> bool:
        return len(self.generated) < len(self.request.generated) + self.request.trial

    @property
    def takes_the_likeliest(self) -> bool:
        params = self.request.params
        return params.temperature < GREEDY_BELOW and not (params.frequency_penalty or params.presence_penalty)

    def rows(self) -> list[Row]:
        """One for the next token, and one for each after a draft token, as if all before it followed."""
        return [
            Row(self.request.params, self.generated + self.draft[:count], self.seed)
            for count in range(len(self.draft) + 1)
        ]

    def look_up(self, most: int) -> int:
        """Makes a draft of at most so many tokens; returns its length."""
        if self._pause:
            self._pause -= 1
            return 0
        most = min(most, self._guess, self.max_new_tokens - len(self.generated) - 1)
        self.draft = propose(np.append(self.keys, np.array(self.generated, np.int64)), most) if most > 0 else []
        return len(self.draft)

    def learn(self, accepted: int) -> None:
        """So many of its draft's tokens were right. Drafts get longer as long as they are, and rarer while none is: a
        wrong one costs up to a whole step."""
        self._guess = 2 * accepted + 1
        self._misses = 0 if accepted else min(2 * self._misses + 1, LONGEST_PAUSE)
        self._pause = self._misses

    def all_kinds(self) -> np.ndarray:
        """[cached] index into KINDS, of the tokens fed so far."""
        return np.append(self.kinds, np.full(self.reserved_tokens - self.prompt_tokens, ANSWER))[: self.cached]

    def prefix(self) -> Prefix:
        """What its extent holds."""
        keys = np.append(self.keys, np.array(self.generated, np.int64))[: self.cached]
        return Prefix(keys, self.experts[: self.cached], Extent(self.extent.start, self.cached))


def embed_next(plan: list[tuple[Sequence, int]], table: torch.Tensor) -> torch.Tensor:
    """Input embeddings [T, H] of the next tokens of sequences, so many of each, end to end."""
    ids: list[int] = []
    places: list[tuple[int, torch.Tensor]] = []
    for sequence, count in plan:
        first, last = sequence.cached, sequence.cached + count
        answer = sequence.generated + sequence.draft if sequence.draft else sequence.generated
        if first >= sequence.prompt_tokens:
            ids += answer[first - sequence.prompt_tokens : last - sequence.prompt_tokens]
            continue
        for begin, values in sequence.soft:
            low, high = max(first, begin), min(last, begin + len(values))
            if low < high:
                places.append((len(ids) + low - first, values[low - begin : high - begin]))
        ids += sequence.ids[first:last].tolist()
        ids += answer[: max(0, last - sequence.prompt_tokens)]
    embeddings = table.index_select(0, torch.tensor(ids, device=table.device))
    for place, values in places:
        embeddings[place : place + len(values)] = values.to(embeddings)
    return embeddings


def _splice(
    request: GenerationRequest, hidden_size: int, vocab_size: int
) -> tuple[list[int], list[int], list[tuple[int, torch.Tensor]]]:
    """Ids and kinds with each placeholder repeated for its soft tokens, and where those begin."""
    ids: list[int] = []
    kinds: list[int] = []
    soft: list[tuple[int, torch.Tensor]] = []
    files = list(request.soft_tokens)
    wanted = sum(token < 0 for token in request.ids)
    if wanted != len(files):
        raise RequestRefused(f"{wanted} media placeholders for {len(files)} media files", "messages")
    for token in request.ids:
        if token >= vocab_size or (token < 0 and token not in _KIND_OF_PLACEHOLDER):
            raise RequestRefused(f"token id {token} is outside the vocabulary of {vocab_size}", "messages")
        if token >= 0:
            ids.append(token)
            kinds.append(0)
            continue
        values = _checked(files[len(soft)], len(soft), hidden_size)
        soft.append((len(ids), values))
        ids += [0] * len(values)
        kinds += [_KIND_OF_PLACEHOLDER[token]] * len(values)
    if not ids:
        raise RequestRefused("the prompt is empty", "messages")
    return ids, kinds, soft


def _checked(values: np.ndarray, number: int, hidden_size: int) -> torch.Tensor:
    """Soft tokens come from outside the engine: a wrong width or a NaN must end here."""
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.shape[1] != hidden_size or not len(values):
        shape = getattr(values, "shape", type(values).__name__)
        raise RequestRefused(f"soft tokens of file {number} are {shape}; wanted [M, {hidden_size}]", "messages")
    if values.dtype not in (np.float16, np.float32) or not np.isfinite(values).all():
        raise RequestRefused(
            f"soft tokens of file {number} ({values.dtype}) must be finite fp16 or fp32 numbers", "messages"
        )
    return torch.from_numpy(values.astype(values.dtype, copy=not values.flags.writeable))
