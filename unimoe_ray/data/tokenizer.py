"""The small byte-level BPE tokenizer of models that start from nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, BOS, EOS, ASSISTANT = "<pad>", "<s>", "</s>", "<|assistant|>"
SPECIALS = (PAD, BOS, EOS, ASSISTANT)
CHATML_START, CHATML_END = "<|im_start|>", "<|im_end|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of at most ``vocab_size`` tokens; every byte has one, so any text can be written."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer for text of users: special tokens written in it are plain characters, never control."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    return tokenizer


def end_token(tokenizer: Tokenizer) -> int:
    """The id that ends an answer: ``<|im_end|>`` where there is one, else ``</s>``."""
    end = tokenizer.token_to_id(CHATML_END)
    return tokenizer.token_to_id(EOS) if end is None else end
