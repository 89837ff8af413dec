"""Our model under the official 4-expert names, adapters merged, in safetensors files named as the official ones are."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from unimoe_ray.config.model import MODALITIES
from unimoe_ray.errors import UnimoeError
from unimoe_ray.interop.language import with_sizes
from unimoe_ray.interop.official.names import official
from unimoe_ray.interop.official.sizes import OURS
from unimoe_ray.interop.shards import MAX_SHARD_BYTES, write_shards
from unimoe_ray.model.language import mixtures
from unimoe_ray.model.unimoe import UniMoE

# The official models have one projector for pictures and videos, and one aligner, of sound or of speech.
FILES = {
    "image": "mm_projector",
    "video": "mm_video_projector",
    "audio": "mm_audio_aligner",
    "speech": "mm_speech_aligner",
}
_PUBLISHED = {"image": "mlp2x_gelu", "video": "mlp2x_gelu", "audio": "qformer", "speech": "whisper_decoder"}


def write_official(model: UniMoE, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """``config.json``, the language model's shards and a file for each connector, into an existing folder.

    Raises UnimoeError for a model whose connectors are not of the published kinds, or that is not sparse.
    """
    for modality in MODALITIES:
        connector = model.config.connector_of(modality)
        if connector.type != _PUBLISHED[modality] or connector.match_text_rms:
            scaled = " with match_text_rms" if connector.match_text_rms else ""
            raise UnimoeError(
                f"the {modality} connector is {connector.type}{scaled}; the official one is {_PUBLISHED[modality]}"
            )
    if not mixtures(model):
        raise UnimoeError("the language model is dense; official checkpoints are mixtures")
    (folder / "config.json").write_text(json.dumps(_config(model), indent=1))
    language = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("language.")}
    if model.config.language.tie_embeddings:
        del language["language.lm_head.weight"]
    write_shards(folder, ((official(name), tensor) for name, tensor in language.items()), max_shard_bytes)
    for modality, stem in FILES.items():
        state = {f"connectors.{modality}.{k}": v for k, v in model.connectors[modality].state_dict().items()}
        if modality == "video" and _same(state, model.connectors["image"].state_dict()):
            continue
        tensors = ((official(name), tensor) for name, tensor in state.items())
        write_shards(folder, tensors, max_bytes=2**62, stem=stem)


def _same(video: dict[str, torch.Tensor], image: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, image[name.split(".", 2)[2]]) for name, tensor in video.items())


def _config(model: UniMoE) -> dict:
    llama, moe = model.language.config, model.config.moe
    return {
        "model_type": "llava",
        "architectures": ["LlavaLlamaForCausalLM"],
        "hidden_size": llama.hidden_size,
        "intermediate_size": llama.intermediate_size,
        "num_hidden_layers": llama.num_hidden_layers,
        "num_attention_heads": llama.num_attention_heads,
        "num_key_value_heads": llama.num_key_value_heads,
        "vocab_size": llama.vocab_size,
        "max_position_embeddings": llama.max_position_embeddings,
        "rms_norm_eps": llama.rms_norm_eps,
        "rope_theta": llama.rope_parameters["rope_theta"],
        "tie_word_embeddings": llama.tie_word_embeddings,
        "hidden_act": llama.hidden_act,
        "bos_token_id": llama.bos_token_id,
        "eos_token_id": llama.eos_token_id,
        "pad_token_id": llama.pad_token_id,
        "moe": True,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "mm_projector_type": "mlp2x_gelu",
        "audio_projector_type": "linear",
        "query_tokens_size": model.config.connector_of("audio").queries.number,
        OURS: with_sizes(model).model_dump(mode="json"),
    }
