"""Conversations to token ids and labels.

Compact template, for small models: ``<s> question <|assistant|> answer </s> question <|assistant|> answer </s>``.
Media placeholders stay where the text has them; only answers and their ``</s>`` are labelled.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer

from unimoe_ray.config.model import IGNORE_INDEX, PLACEHOLDER_IDS
from unimoe_ray.data.schema import PLACEHOLDER, Media, Sample
from unimoe_ray.data.tokenizer import ASSISTANT, BOS, EOS, end_token


@dataclass(frozen=True)
class Encoded:
    """ids: text ids, and one placeholder id per media file; labels: -100 where not to be learned."""

    ids: list[int]
    labels: list[int]


def encode_sample(sample: Sample, tokenizer: Tokenizer) -> Encoded:
    """All turns, answers labelled."""
    media = iter(sample.media)
    ids, labels = [tokenizer.token_to_id(BOS)], [IGNORE_INDEX]
    end = tokenizer.token_to_id(EOS)
    for question, answer in sample.turns:
        prompt = _encode_question(question, media, tokenizer)
        reply = [*_encode_text(answer, tokenizer), end]
        ids += prompt + reply
        labels += [IGNORE_INDEX] * len(prompt) + reply
    return Encoded(ids, labels)


def encode_prompt(sample: Sample, tokenizer: Tokenizer) -> list[int]:
    """The conversation up to the place where the last answer begins; that answer is left out."""
    media = iter(sample.media)
    ids = [tokenizer.token_to_id(BOS)]
    end = tokenizer.token_to_id(EOS)
    for number, (question, answer) in enumerate(sample.turns, start=1):
        ids += _encode_question(question, media, tokenizer)
        if number < len(sample.turns):
            ids += [*_encode_text(answer, tokenizer), end]
    return ids


def plain_text(text: str) -> str:
    """Placeholders belong to files; written by a user they are text."""
    return PLACEHOLDER.sub(r"< \1>", text)


def decode(ids: list[int], tokenizer: Tokenizer) -> str:
    """Generated ids to text, up to the end token, without special tokens and outer spaces."""
    end = end_token(tokenizer)
    if end in ids:
        ids = ids[: ids.index(end)]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def _encode_question(question: str, media, tokenizer: Tokenizer) -> list[int]:
    ids: list[int] = []
    position = 0
    for match in PLACEHOLDER.finditer(question):
        ids += _encode_text(question[position : match.start()], tokenizer)
        item: Media = next(media)
        ids.append(PLACEHOLDER_IDS[item.kind])
        position = match.end()
    ids += _encode_text(question[position:], tokenizer)
    return [*ids, tokenizer.token_to_id(ASSISTANT)]


def _encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    """Special tokens in a user's text are plain characters, never control."""
    stripped = " ".join(text.split())
    return tokenizer.encode(stripped, add_special_tokens=False).ids if stripped else []
