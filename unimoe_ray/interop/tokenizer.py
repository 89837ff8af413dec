"""Our ``tokenizer.json`` as a tokenizer of transformers."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from unimoe_ray.data.tokenizer import CHATML_END, CHATML_START


def wrap_tokenizer(path: Path, max_length: int) -> PreTrainedTokenizerFast:
    """The special tokens are ChatML's if it has them, else those of ``<s> </s> <pad> <unk>`` that it has; a LLaMA's
    pads are ``<unk>``."""
    vocab = Tokenizer.from_file(str(path)).get_vocab()
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    if CHATML_END in vocab:
        specials = {"bos_token": CHATML_START, "eos_token": CHATML_END, "pad_token": CHATML_END}
    given = {name: token for name, token in specials.items() if token in vocab}
    if "pad_token" not in given and "unk_token" in given:
        given["pad_token"] = given["unk_token"]
    return PreTrainedTokenizerFast(tokenizer_file=str(path), model_max_length=max_length, **given)
