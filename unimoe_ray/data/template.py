"""The conversation templates behind one interface, by the names that ``data.template`` has."""

from __future__ import annotations

from typing import Protocol

from tokenizers import Tokenizer

from unimoe_ray.data.chatml import SMOLLM2_SYSTEM, ChatMLTemplate
from unimoe_ray.data.prompt import Encoded, encode_prompt, encode_sample
from unimoe_ray.data.schema import Sample
from unimoe_ray.data.vicuna import VicunaTemplate


class Template(Protocol):
    """Conversations to ids: text ids, and one placeholder id for each media file, where the text has it."""

    tokenizer: Tokenizer

    def encode_sample(self, sample: Sample) -> Encoded:
        """All turns, answers labelled."""

    def encode_prompt(self, sample: Sample) -> list[int]:
        """The conversation up to the place where the last answer begins; that answer is left out."""


class CompactTemplate:
    """``data.prompt``'s, for small models whose tokenizer was trained for it."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def encode_sample(self, sample: Sample) -> Encoded:
        return encode_sample(sample, self.tokenizer)

    def encode_prompt(self, sample: Sample) -> list[int]:
        return encode_prompt(sample, self.tokenizer)


def make_template(name: str, tokenizer: Tokenizer, legacy: bool = True) -> Template:
    """``compact``, ``vicuna_v1`` or ``smollm2``; ``legacy`` as in ``VicunaTemplate``. Raises ValueError for others."""
    if name == "compact":
        return CompactTemplate(tokenizer)
    if name == "vicuna_v1":
        return VicunaTemplate(tokenizer, legacy)
    if name == "smollm2":
        return ChatMLTemplate(tokenizer, SMOLLM2_SYSTEM)
    raise ValueError(f"template '{name}' does not exist; allowed: compact, vicuna_v1, smollm2")
