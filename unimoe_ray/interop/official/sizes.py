"""The configuration of a model from an official ``config.json`` and the shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from unimoe_ray.config.model import (
    ConnectorConfig,
    ConnectorsConfig,
    LanguageConfig,
    ModelConfig,
    MoEConfig,
    QueriesConfig,
    TowersConfig,
    VideoConfig,
)
from unimoe_ray.errors import UnimoeError

Shapes = Mapping[str, tuple[int, ...]]
"""By our names (see ``names``)."""

# The 8-expert model's slots, by the files that fill them (its code's list).
SLOTS_8E = ("audiocap", "basev", "base", "base1", "base4", "base7", "base", "base7")
HEAD_SIZE = 64  # of BLIP-2's Q-Former and of every Whisper
AUDIO_FEATURES = 768  # of BEATs and of Whisper-small
# Official configurations name folders of their authors' cluster.
PUBLISHED_TOWERS = TowersConfig.model_validate(
    {
        "image": {"name": "clip", "path": "openai/clip-vit-large-patch14-336"},
        "speech": {"name": "whisper", "path": "openai/whisper-small"},
        "audio": {"name": "beats", "path": "BEATs_iter3_plus_AS2M.pt"},
    }
)
OURS = "unimoe_ray"  # in a config.json that we wrote: our whole configuration


def is_8e(config: Mapping[str, Any]) -> bool:
    """Whether the experts are in the files of the official 8-expert code. What we wrote has the 4-expert names."""
    return OURS not in config and ("moe_type" in config or config.get("num_experts") == len(SLOTS_8E))


def model_config(config: Mapping[str, Any], shapes: Shapes) -> ModelConfig:
    """Raises UnimoeError for a setting that is missing or that our model has no equal of."""
    try:
        if OURS in config:
            return ModelConfig.model_validate(config[OURS])
        if config.get("mm_projector_type", "mlp2x_gelu") != "mlp2x_gelu":
            raise UnimoeError(f"config.json: mm_projector_type {config['mm_projector_type']} is not supported")
        for key in ("use_fm_block", "mm_use_im_start_end", "rope_scaling", "attention_bias"):
            if config.get(key):
                raise UnimoeError(f"config.json: {key} {config[key]} is not supported")
        known = [kind for kind in ("audio", "speech") if f"connectors.{kind}.query_tokens" in shapes]
        connectors = {kind: _query_connector(kind, config, shapes) for kind in known}
        for kind, other in (("audio", "speech"), ("speech", "audio")):
            if kind not in connectors and other in connectors:
                connectors[kind] = connectors[other].model_copy(update={"type": _TYPES[kind]})
        connectors["video"] = "image"
        return ModelConfig(
            language=_language(config),
            moe=_mixture(config, shapes),
            connector=ConnectorConfig(type="mlp2x_gelu", match_text_rms=False),
            connectors=ConnectorsConfig(**connectors),
            video=VideoConfig(frames=8, pooling="mean"),
            towers=PUBLISHED_TOWERS,
        )
    except KeyError as error:
        raise UnimoeError(f"config.json: {error.args[0]} is missing") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise UnimoeError(f"config.json: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def feature_dims(config: Mapping[str, Any], shapes: Shapes) -> dict[str, int]:
    """What the towers give: from the projector, the cross-attention of a Q-Former and the width of a decoder."""
    seen = shapes.get("connectors.image.projection.0.weight", (0, config.get("mm_hidden_size", 1024)))[1]
    qformer = "connectors.audio.qformer.qformer.encoder.layer.0.crossattention.attention.key.weight"
    sound = shapes[qformer][1] if qformer in shapes else None
    speech = shapes.get("connectors.speech.query_tokens", (None,))[-1]
    usual = config.get("mm_audio_hidden_size", AUDIO_FEATURES)
    return {"image": seen, "video": seen, "audio": sound or speech or usual, "speech": speech or sound or usual}


_POSITIONS = "connectors.speech.decoder.audio_decoder.embed_positions.weight"
_TYPES = {"audio": "qformer", "speech": "whisper_decoder"}


def _language(config: Mapping[str, Any]) -> LanguageConfig:
    heads = config["num_attention_heads"]
    return LanguageConfig(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        vocab_size=max(config["vocab_size"], 264),
        max_positions=config["max_position_embeddings"],
        rms_norm_eps=config["rms_norm_eps"],
        rope_theta=config.get("rope_theta") or 10_000.0,
        tie_embeddings=bool(config.get("tie_word_embeddings")),
    )


def _mixture(config: Mapping[str, Any], shapes: Shapes) -> MoEConfig:
    layers, experts = config["num_hidden_layers"], config["num_experts"]
    if is_8e(config):
        stride = 1 if config.get("moe_type", "dense") == "dense" else config["moe_stride"]
        sparse = list(range(0, layers, stride))
        slots = list(SLOTS_8E) if experts == len(SLOTS_8E) else [f"expert{number}" for number in range(experts)]
    else:
        found = (re.match(r"language\.model\.layers\.(\d+)\.mlp\.experts\.", name) for name in shapes)
        sparse = sorted({int(match[1]) for match in found if match})
        slots = [f"expert{number}" for number in range(experts)]
    # The experts are there: nothing has to be trained before they fill their slots.
    moe = MoEConfig(slots=slots, top_k=config["num_experts_per_tok"], init="copies")
    for placement in ("all", "interval", "first_half", "second_half"):
        moe = moe.model_copy(update={"layers": placement})
        if moe.sparse_layers(layers) == sparse:
            return moe
    raise UnimoeError(f"mixtures in layers {sparse} of {layers} are neither all, every other one, nor one half")


def _query_connector(kind: str, config: Mapping[str, Any], shapes: Shapes) -> ConnectorConfig:
    """Sizes from the tensors. They don't tell the number of heads: published ones have 64 dimensions each; a
    ``config.json`` may hold ``qformer`` or ``whisper`` with another number."""
    _, number, width = shapes[f"connectors.{kind}.query_tokens"]
    mine = {name: shape for name, shape in shapes.items() if name.startswith(f"connectors.{kind}.")}
    numbers = [int(match[1]) for name in mine if (match := re.search(r"\.layers?\.(\d+)\.", name))]
    crossed = {int(match[1]) for name in mine if (match := re.search(r"\.(\d+)\.crossattention\.", name))}
    wide = "intermediate_query.dense.weight" if kind == "audio" else "layers.0.fc1.weight"
    intermediate = next((shape[0] for name, shape in mine.items() if name.endswith(wide)), None)
    if not numbers or intermediate is None:
        raise UnimoeError(f"mm_audio_aligner holds no layers of a {_TYPES[kind]}")
    layers = max(numbers) + 1
    given = config.get("qformer", {}).get("num_attention_heads") if kind == "audio" else None
    given = config.get("whisper", {}).get("decoder_attention_heads") if kind == "speech" else given
    return ConnectorConfig(
        type=_TYPES[kind],
        match_text_rms=False,
        queries=QueriesConfig(
            number=number,
            hidden_size=width if kind == "audio" else None,
            num_layers=layers,
            num_heads=given or max(1, width // HEAD_SIZE),
            intermediate_size=intermediate,
            cross_attention_every=sorted(crossed)[1] if len(crossed) > 1 else layers,
            positions=mine.get(_POSITIONS, (448,))[0],
        ),
    )
