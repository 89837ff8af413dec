"""The tokenizer of a pretrained LLaMA, out of its folder or from the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from tokenizers import Tokenizer

from unimoe_ray.data.sentencepiece import load_sentencepiece
from unimoe_ray.data.tokenizer import BOS, CHATML_END, CHATML_START, EOS, load_tokenizer
from unimoe_ray.errors import UnimoeError

_KEY = "model.language.pretrained"


class PretrainedTokenizer(NamedTuple):
    """legacy: the flag of ``tokenizer_config.json`` (see ``data.vicuna.VicunaTemplate``); transformers' default is
    True."""

    tokenizer: Tokenizer
    legacy: bool


def load_pretrained_tokenizer(path: str, template: str) -> PretrainedTokenizer:
    """``tokenizer.model`` (as LLaMA's authors and Vicuna's publish it), or else ``tokenizer.json``.

    Raises UnimoeError when there is neither, or when it lacks what the template relies on.
    """
    if (model := _file(path, "tokenizer.model")) is not None:
        tokenizer = load_sentencepiece(model)
    elif (fast := _file(path, "tokenizer.json")) is not None:
        tokenizer = load_tokenizer(fast)
    else:
        raise UnimoeError(f"{_KEY}: {path}: has no tokenizer.model and no tokenizer.json")
    if not _fits(tokenizer, template):
        raise UnimoeError(
            f"{_KEY}: {path}: its tokenizer is not of {_KINDS[template]}, which data.template={template} needs"
        )
    settings = _file(path, "tokenizer_config.json")
    return PretrainedTokenizer(tokenizer, True if settings is None else _legacy(settings))


_KINDS = {"vicuna_v1": "LLaMA's kind", "smollm2": "SmolLM2's kind"}


def _fits(tokenizer: Tokenizer, template: str) -> bool:
    """Vicuna's relies on ``<s>``, ``</s>`` and a space before every text that is encoded, ChatML on its two tokens."""
    pieces = tokenizer.encode("a", add_special_tokens=False).tokens
    spaced = bool(pieces) and pieces[0].startswith("▁")
    chatml = None not in map(tokenizer.token_to_id, (CHATML_START, CHATML_END))
    if template == "smollm2":
        return chatml and not spaced
    return spaced and not chatml and None not in map(tokenizer.token_to_id, (BOS, EOS))


def _legacy(settings: Path) -> bool:
    try:
        flag = json.loads(settings.read_text(encoding="utf-8")).get("legacy")
    except (ValueError, AttributeError) as error:
        raise UnimoeError(f"{settings}: not a tokenizer's configuration ({error})") from None
    return True if flag is None else bool(flag)


def _file(path: str, name: str) -> Path | None:
    """A file of the checkpoint, None if it has none of this name."""
    if Path(path).is_dir():
        return Path(path, name) if Path(path, name).is_file() else None
    try:
        return Path(hf_hub_download(path, name))
    except EntryNotFoundError:
        return None
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnimoeError(f"{_KEY}: {path}: neither a folder nor a model that the hub gives ({reason})") from None
