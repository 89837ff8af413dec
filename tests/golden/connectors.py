"""Connectors and the splice against the official ones."""

from __future__ import annotations

import torch
from transformers import Blip2QFormerConfig, WhisperConfig

from tests.golden.case import Case
from unimoe_ray.config.model import ConnectorConfig, VideoConfig
from unimoe_ray.interop.official import names
from unimoe_ray.model.connectors import QFormerConnector, WhisperDecoderConnector, build_connector
from unimoe_ray.model.connectors.queries import QueryConnector
from unimoe_ray.model.features import Features

UNUSED = names.UNUSED_TABLE.removeprefix(names.ALIGNER)


def windows(values: torch.Tensor) -> Features:
    """[B, N, D], each a file of its own."""
    count, length = values.shape[:2]
    return Features(values, torch.full((count,), length), torch.arange(count))


def projector(case: Case, modality: str, prefix: str = "mm_projector."):
    config = case.config
    assert config["mm_projector_type"] == "mlp2x_gelu"
    settings = ConnectorConfig(type="mlp2x_gelu", match_text_rms=False)
    frames = case.inputs["frame_features"].shape[1] if "frame_features" in case.inputs else 8
    video = VideoConfig(frames=frames, pooling="mean")
    connector = build_connector(modality, config["mm_hidden_size"], config["hidden_size"], settings, video)
    connector.projection.load_state_dict(case.weights(prefix))
    return connector.eval()


@torch.no_grad()
def mm_projector_mlp2x_gelu(case: Case) -> None:
    case.check("projected", projector(case, "image")(windows(case.inputs["image_features"])).values)


@torch.no_grad()
def video_pooling(case: Case) -> None:
    frames = case.inputs["frame_features"]
    videos, count = frames.shape[:2]
    connector = projector(case, "video")
    owner = torch.arange(videos).repeat_interleave(count)
    features = Features(frames.flatten(0, 1), torch.full((videos * count,), frames.shape[2]), owner)
    case.check("per_frame_projected", connector.project(frames))
    case.check("video_tokens", connector(features).values)


def _compare_aligner(case: Case, connector: QueryConnector, read_name: str) -> None:
    features = windows(case.inputs["encoder_output"])
    case.check(read_name, connector.attend(features.values))
    case.check("aligner_output", connector(features).values)
    connector.query_tokens.zero_()
    case.check("aligner_output_zero_queries", connector(features).values)


@torch.no_grad()
def audio_aligner_qformer(case: Case) -> None:
    config = case.config
    connector = QFormerConnector(
        Blip2QFormerConfig(**config["qformer"]), config["query_tokens_size"], config["llm_hidden_size"]
    )
    connector.load_state_dict(case.weights())
    _compare_aligner(case, connector.eval(), "qformer_output")


@torch.no_grad()
def speech_aligner_whisper_decoder(case: Case) -> None:
    config = case.config
    connector = WhisperDecoderConnector(
        WhisperConfig(**config["whisper"]), config["query_tokens_size"], config["llm_hidden_size"]
    )
    weights = case.weights()
    del weights[UNUSED]
    connector.load_state_dict(weights | {"query_tokens": case.inputs["query_tokens"]})
    _compare_aligner(case, connector.eval(), "decoder_output")
