"""The configuration of a model with the language model's sizes written out, wherever they came from."""

from __future__ import annotations

from transformers import LlamaConfig

from unimoe_ray.config.model import LanguageConfig, ModelConfig
from unimoe_ray.errors import UnimoeError
from unimoe_ray.model.language import llama_config
from unimoe_ray.model.unimoe import UniMoE


def with_sizes(model: UniMoE) -> ModelConfig:
    """The model's configuration, which builds it without reading another folder. Raises UnimoeError."""
    return model.config.model_copy(update={"language": explicit_language(model.language.config)})


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
