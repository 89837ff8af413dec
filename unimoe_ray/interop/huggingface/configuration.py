"""What ``config.json`` holds."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedConfig

from unimoe_ray.config.model import LanguageConfig, ModelConfig
from unimoe_ray.errors import UnimoeError
from unimoe_ray.interop.huggingface.towers import describe_tower
from unimoe_ray.model.language import build_llama
from unimoe_ray.model.towers import FrozenTower
from unimoe_ray.model.unimoe import UniMoE


class UniMoEConfig(PreTrainedConfig):
    """Everything that decides the architecture, so that loading reads no other folder.

    model: a ``ModelConfig`` whose language model has its sizes written out
    feature_dims: feature dim D of each modality's tower
    sparse: whether the language model's layers are mixtures already
    towers: by modality, what ``build_tower`` takes
    """

    model_type = "unimoe"

    model: dict[str, Any] | None = None
    vocab_size: int = 0
    feature_dims: dict[str, int] | None = None
    sparse: bool = False
    towers: dict[str, dict[str, Any]] | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @classmethod
    def of(cls, model: UniMoE, towers: dict[str, FrozenTower], sparse: bool) -> UniMoEConfig:
        """Of an existing model. Raises UnimoeError when its language model has settings that ours can't write."""
        llama = model.language.config
        settings = model.config.model_copy(update={"language": explicit_language(llama)})
        return cls(
            model=settings.model_dump(mode="json"),
            vocab_size=llama.vocab_size,
            feature_dims=feature_dims(towers),
            sparse=sparse,
            towers={modality: describe_tower(tower) for modality, tower in towers.items()},
            tie_word_embeddings=llama.tie_word_embeddings,
            bos_token_id=llama.bos_token_id,
            eos_token_id=llama.eos_token_id,
            pad_token_id=llama.pad_token_id,
        )

    @property
    def settings(self) -> ModelConfig:
        return ModelConfig.model_validate(self.model)


def feature_dims(towers: dict[str, FrozenTower]) -> dict[str, int]:
    """Videos go to the image tower, frame by frame."""
    dims = {modality: tower.feature_dim for modality, tower in towers.items()}
    return dims | {"video": dims["image"]}


def explicit_language(llama: LlamaConfig) -> LanguageConfig:
    """The sizes of a LLaMA that may have been read from a folder. Raises UnimoeError for settings beyond them."""
    sizes = LanguageConfig(
        hidden_size=llama.hidden_size,
        intermediate_size=llama.intermediate_size,
        num_layers=llama.num_hidden_layers,
        num_heads=llama.num_attention_heads,
        num_kv_heads=llama.num_key_value_heads,
        vocab_size=max(llama.vocab_size, 264),
        max_positions=llama.max_position_embeddings,
        rms_norm_eps=llama.rms_norm_eps,
        rope_theta=llama.rope_parameters["rope_theta"],
        tie_embeddings=llama.tie_word_embeddings,
    )
    again = llama_config(sizes, llama.vocab_size)
    for name in ("rope_parameters", "head_dim", "hidden_act", "attention_bias", "mlp_bias"):
        found, wanted = getattr(llama, name), getattr(again, name)
        if found != wanted:
            raise UnimoeError(f"a language model with {name} {found} can't be written, only with {wanted}")
    return sizes


def llama_config(sizes: LanguageConfig, vocab_size: int) -> LlamaConfig:
    """Of the LLaMA that these sizes make, without making its weights."""
    with torch.device("meta"):
        return build_llama(sizes, vocab_size).config
