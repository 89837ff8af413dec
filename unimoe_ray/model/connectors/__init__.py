"""Connectors: features of a frozen tower to soft tokens in the language model's space (Uni-MoE, section 3.1)."""

from __future__ import annotations

from torch import nn
from transformers import Blip2QFormerConfig, WhisperConfig, WhisperModel

from unimoe_ray.config.model import MODALITIES, ConnectorConfig, ModelConfig, VideoConfig
from unimoe_ray.model.connectors.base import Connector
from unimoe_ray.model.connectors.mlp import GeluProjector, MLPConnector
from unimoe_ray.model.connectors.queries import QFormerConnector, QueryConnector, WhisperDecoderConnector
from unimoe_ray.model.connectors.video import VideoConnector, VideoProjector, merge_patches
from unimoe_ray.model.pretrained import naming, read_pretrained

__all__ = [
    "Connector",
    "GeluProjector",
    "MLPConnector",
    "QFormerConnector",
    "QueryConnector",
    "VideoConnector",
    "VideoProjector",
    "WhisperDecoderConnector",
    "build_connector",
    "build_connectors",
    "merge_patches",
    "read_connectors",
]


def build_connectors(feature_dims: dict[str, int], hidden_size: int, config: ModelConfig) -> nn.ModuleDict:
    """Those of all modalities. With ``connectors.video: image``, the layers of the image connector are also the video
    connector's: they have two names in a state dict, and are one parameter to everything else."""
    connectors = nn.ModuleDict(
        {m: build_connector(m, feature_dims[m], hidden_size, config.connector_of(m), config.video) for m in MODALITIES}
    )
    if config.video_shares_image:
        for name, layer in connectors["image"].named_children():
            setattr(connectors["video"], name, layer)
    return connectors


def read_connectors(connectors: nn.ModuleDict, config: ModelConfig) -> None:
    """Whisper's decoder into the connectors that are to start as one. Raises UnimoeError naming the key when there is
    none that fits."""
    for modality, connector in connectors.items():
        path = config.connector_of(modality).pretrained
        if path is not None:
            with naming(f"model.connectors.{modality}.pretrained", path, "Whisper decoder of this connector's size"):
                connector.start_as(read_pretrained(WhisperModel, WhisperConfig, path).decoder)


def build_connector(
    modality: str, feature_dim: int, hidden_size: int, connector: ConnectorConfig, video: VideoConfig
) -> Connector:
    """The connector of one modality, from features [B, N, feature_dim] to soft tokens [B, M, hidden_size].

    Raises ValueError where the configured sizes do not fit the features.
    """
    rms, queries = connector.match_text_rms, connector.queries
    if connector.type in ("mlp", "mlp2x_gelu"):
        plain = connector.type == "mlp"
        if modality == "video":
            return (VideoConnector if plain else VideoProjector)(feature_dim, hidden_size, rms, video)
        return (MLPConnector if plain else GeluProjector)(feature_dim, hidden_size, rms)
    if connector.type == "qformer":
        qformer = Blip2QFormerConfig(
            hidden_size=queries.hidden_size or feature_dim,
            num_hidden_layers=queries.num_layers,
            num_attention_heads=queries.num_heads,
            intermediate_size=queries.intermediate_size,
            hidden_dropout_prob=queries.dropout,
            attention_probs_dropout_prob=queries.dropout,
            cross_attention_frequency=queries.cross_attention_every,
            encoder_hidden_size=feature_dim,
        )
        return QFormerConnector(qformer, queries.number, hidden_size, rms)
    if queries.hidden_size not in (None, feature_dim):
        raise ValueError(f"queries.hidden_size is {queries.hidden_size}; Whisper's decoder has that of its encoder")
    decoder = WhisperConfig(
        vocab_size=1,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
        d_model=feature_dim,
        decoder_layers=queries.num_layers,
        decoder_attention_heads=queries.num_heads,
        decoder_ffn_dim=queries.intermediate_size,
        dropout=queries.dropout,
        max_target_positions=queries.positions,
    )
    return WhisperDecoderConnector(decoder, queries.number, hidden_size, rms)
