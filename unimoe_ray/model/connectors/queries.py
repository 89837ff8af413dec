"""Connectors in which a fixed number of learned queries reads each window (Uni-MoE, section 3.1, "Q-Former").

The paper's 4-layer transformer is not what was released. Sound has a BLIP-2 Q-Former of 12 layers, speech the 12-layer
decoder of Whisper-small; both with 50 queries, which start as zeros, for each 30 s, and one linear layer on top.
Parameters have the published names, relative to ``mm_audio_aligner``; speech stores its ``query_tokens`` outside.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperDecoder

from unimoe_ray.model.connectors.base import Connector
from unimoe_ray.model.features import Features


class QueryConnector(Connector):
    """``queries`` soft tokens for each window, by the subclass's ``attend`` and the linear ``projector``."""

    def __init__(self, width: int, queries: int, hidden_size: int, match_text_rms: bool):
        super().__init__(match_text_rms)
        self.query_tokens = nn.Parameter(torch.zeros(1, queries, width))
        self.projector = nn.Linear(width, hidden_size)

    @property
    def projection(self) -> nn.Linear:
        return self.projector

    def attend(self, values: torch.Tensor) -> torch.Tensor:
        """Features [B, N, D] without padding to [B, queries, width]."""
        raise NotImplementedError

    def forward(self, features: Features) -> Features:
        """Windows of one length go together: neither transformer is told to leave padding out."""
        lengths, parts, rows = features.lengths, [], []
        for length in lengths.unique().tolist():
            index = (lengths == length).nonzero().squeeze(-1)
            parts.append(self.attend(features.values[index, :length]))
            rows.append(index)
        read = torch.cat(parts)[torch.cat(rows).argsort()]
        soft = self.rescale(self.projector(read))
        return Features(soft, torch.full_like(lengths, soft.shape[1]), features.owner)

    def soft_tokens(self, window_lengths: list[int]) -> int:
        return self.query_tokens.shape[1] * len(window_lengths)


class QFormerConnector(QueryConnector):
    """BLIP-2's Q-Former (arXiv 2301.12597, section 3.1) without text: the queries see each other, in both directions
    and without positions, and in every other layer the features."""

    def __init__(self, config: Blip2QFormerConfig, queries: int, hidden_size: int, match_text_rms: bool = False):
        super().__init__(config.hidden_size, queries, hidden_size, match_text_rms)
        self.qformer = nn.ModuleDict({"qformer": Blip2QFormerModel(config)})

    def attend(self, values: torch.Tensor) -> torch.Tensor:
        queries = self.query_tokens.expand(len(values), -1, -1)
        return self.qformer["qformer"](query_embeds=queries, encoder_hidden_states=values).last_hidden_state


class WhisperDecoderConnector(QueryConnector):
    """Whisper's decoder (arXiv 2212.04356, section 2.2) with queries for tokens: its learned positions are added, each
    query sees those before it, and in every layer the features. The decoder's own table of tokens is dropped."""

    def __init__(self, config: WhisperConfig, queries: int, hidden_size: int, match_text_rms: bool = False):
        if queries > config.max_target_positions:
            raise ValueError(f"{queries} queries are more than the decoder's {config.max_target_positions} positions")
        super().__init__(config.d_model, queries, hidden_size, match_text_rms)
        decoder = WhisperDecoder(config)
        del decoder.embed_tokens
        self.decoder = nn.ModuleDict({"audio_decoder": decoder})

    def start_as(self, decoder: WhisperDecoder) -> None:
        """With the weights of a Whisper's decoder, all but its table of tokens. Raises RuntimeError when the sizes
        differ."""
        state = {name: tensor for name, tensor in decoder.state_dict().items() if not name.startswith("embed_tokens.")}
        self.decoder["audio_decoder"].load_state_dict(state)

    def attend(self, values: torch.Tensor) -> torch.Tensor:
        queries = self.query_tokens.expand(len(values), -1, -1)
        decoder = self.decoder["audio_decoder"]
        return decoder(inputs_embeds=queries, encoder_hidden_states=values, use_cache=False).last_hidden_state
