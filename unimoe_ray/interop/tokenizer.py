"""Our ``tokenizer.json`` as a tokenizer of transformers."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast


def wrap_tokenizer(path: Path, max_length: int) -> PreTrainedTokenizerFast:
    """The special tokens are those that it has of ``<s> </s> <pad> <unk>``; a LLaMA's pads are ``<unk>``."""
    vocab = Tokenizer.from_file(str(path)).get_vocab()
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    given = {name: token for name, token in specials.items() if token in vocab}
    if "pad_token" not in given and "unk_token" in given:
        given["pad_token"] = given["unk_token"]
    return PreTrainedTokenizerFast(tokenizer_file=str(path), model_max_length=max_length, **given)
