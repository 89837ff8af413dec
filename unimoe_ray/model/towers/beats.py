"""The encoder of BEATs (Chen et al., arXiv 2212.09058, section 3): patches of a log-mel spectrogram through a
transformer with DeepNorm (arXiv 2203.00555) and gated relative position biases (WavLM, arXiv 2110.13900, equation 2).

Parameters have the published names, so that ``BEATs_iter3_plus_AS2M.pt`` loads (``load_beats``). There is no dropout:
the encoder is frozen wherever it is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from unimoe_ray.model.towers import SAMPLE_RATE, FrozenTower
from unimoe_ray.model.towers.fbank import fbank, frames_of
from unimoe_ray.model.towers.windows import MAX_WINDOWS, WINDOW_SECONDS, count_windows, split_windows

MEL_BANDS = 128
MEAN, DEVIATION = 15.41663, 2 * 6.55582  # of AudioSet's log-mel spectrograms, as published
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu}


@dataclass(frozen=True)
class BeatsConfig:
    """The part of the published ``cfg`` that decides what the encoder computes, under its own names.

    The defaults are those of the iter3+ checkpoints: 90 M parameters.
    """

    input_patch_size: int = 16
    embed_dim: int = 512
    conv_bias: bool = False
    encoder_layers: int = 12
    encoder_embed_dim: int = 768
    encoder_ffn_embed_dim: int = 3072
    encoder_attention_heads: int = 12
    activation_fn: str = "gelu"
    deep_norm: bool = True
    conv_pos: int = 128
    conv_pos_groups: int = 16
    num_buckets: int = 320
    max_distance: int = 800

    @classmethod
    def from_published(cls, cfg: Mapping[str, Any]) -> BeatsConfig:
        """From the ``cfg`` of a checkpoint. Raises ValueError for a variant that is not implemented."""
        wanted = {
            "layer_norm_first": False,
            "relative_position_embedding": True,
            "gru_rel_pos": True,
            "finetuned_model": False,
        }
        for key, value in wanted.items():
            if cfg.get(key, value) != value:
                raise ValueError(f"BEATs with {key}={cfg[key]} is not supported, only {key}={value}")
        config = cls(**{f.name: cfg[f.name] for f in fields(cls) if f.name in cfg})
        if config.activation_fn not in ACTIVATIONS:
            raise ValueError(
                f"BEATs with activation_fn={config.activation_fn} is not supported, only {', '.join(ACTIVATIONS)}"
            )
        return config


class Beats(nn.Module):
    """Normalised log-mel spectrograms to features, one for each patch of 16 frames x 16 bands: time step by time step,
    low frequencies first."""

    def __init__(self, config: BeatsConfig):
        super().__init__()
        self.config = config
        patch = config.input_patch_size
        self.patch_embedding = nn.Conv2d(1, config.embed_dim, patch, patch, bias=config.conv_bias)
        self.layer_norm = nn.LayerNorm(config.embed_dim)
        same = config.embed_dim == config.encoder_embed_dim
        self.post_extract_proj = None if same else nn.Linear(config.embed_dim, config.encoder_embed_dim)
        self.encoder = _Encoder(config)

    def forward(self, spectrogram: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        """spectrogram [B, frames, 128], padding [B, frames] bool (True where a frame is padding only) to [B, N, D].

        Patches that are padding attend and are not attended to; what is in their own rows has no meaning.
        """
        return self.encoder(self.embed(spectrogram), None if padding is None else self.patch_padding(padding))

    def embed(self, spectrogram: torch.Tensor) -> torch.Tensor:
        """[B, frames, 128] to patch embeddings [B, N, D]."""
        x = self.layer_norm(self.patch_embedding(spectrogram.unsqueeze(1)).flatten(2).transpose(1, 2))
        return x if self.post_extract_proj is None else self.post_extract_proj(x)

    def patches_of(self, frames: int) -> int:
        """N for so many frames."""
        patch = self.config.input_patch_size
        return (frames // patch) * (MEL_BANDS // patch)

    def patch_padding(self, padding: torch.Tensor) -> torch.Tensor:
        """[B, frames] to [B, N]. As in the published code, a patch looks at the frames that have its share of the
        sequence: of a time step that is padding in part, only the upper bands are masked."""
        return reduce_padding(padding, self.patches_of(padding.shape[1]))


def reduce_padding(padding: torch.Tensor, length: int) -> torch.Tensor:
    """[B, n] bool to [B, length]: all of n // length neighbours. What is over at the end counts nowhere."""
    group = padding.shape[1] // length
    return padding[:, : group * length].view(len(padding), length, group).all(dim=-1)


class _Encoder(nn.Module):
    def __init__(self, config: BeatsConfig):
        super().__init__()
        width = config.encoder_embed_dim
        self.pos_conv = nn.Sequential(_PositionalConv(width, config.conv_pos, config.conv_pos_groups), nn.GELU())
        self.layer_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.encoder_layers))
        # The published state dicts repeat the one table under every layer.
        self.max_distance = config.max_distance
        table = nn.Embedding(config.num_buckets, config.encoder_attention_heads)
        for layer in self.layers:
            layer.self_attn.relative_attention_bias = table

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        """x [B, N, D], padding [B, N] bool or None to [B, N, D]."""
        if padding is not None:
            x = x.masked_fill(padding[..., None], 0)
        x = self.layer_norm(x + self.pos_conv(x.transpose(1, 2)).transpose(1, 2))
        table = self.layers[0].self_attn.relative_attention_bias
        bias = table(relative_buckets(x.shape[1], table.num_embeddings, self.max_distance, x.device)).permute(2, 0, 1)
        for layer in self.layers:
            x = layer(x, bias, padding)
        return x


class _PositionalConv(nn.Module):
    """A grouped convolution over time whose weight is normalised for each tap, [B, D, N] to [B, D, N].

    torch's own weight norm would name its parameters otherwise than the checkpoints do.
    """

    def __init__(self, width: int, taps: int, groups: int):
        super().__init__()
        self.groups = groups
        self.weight_v = nn.Parameter(torch.empty(width, width // groups, taps))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.normal_(self.weight_v, std=math.sqrt(4 / (taps * width)))
        self.weight_g = nn.Parameter(self.weight_v.detach().norm(dim=(0, 1), keepdim=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight_v * (self.weight_g / self.weight_v.norm(dim=(0, 1), keepdim=True))
        y = F.conv1d(x, weight, self.bias, padding=weight.shape[-1] // 2, groups=self.groups)
        return y[..., : x.shape[-1]]


def relative_buckets(length: int, buckets: int, max_distance: int, device: torch.device) -> torch.Tensor:
    """The bucket of every key position relative to every query position, [queries, keys] int64 (T5, arXiv 1910.10683,
    section 2.1): half of the buckets for keys behind, half for keys ahead; each half exact when near, then logarithmic
    up to ``max_distance``."""
    position = torch.arange(length, device=device)
    relative = position[None, :] - position[:, None]
    half = buckets // 2
    exact = half // 2
    distance = relative.abs()
    scale = (half - exact) / math.log(max_distance / exact)
    far = exact + (torch.log(distance.clamp(min=1).float() / exact) * scale).long()
    bucket = torch.where(distance < exact, distance, far.clamp(max=half - 1))
    return bucket + half * (relative > 0)


class _Layer(nn.Module):
    """Attention and feed-forward block, each normalised after a residual that DeepNorm scales up."""

    def __init__(self, config: BeatsConfig):
        super().__init__()
        width = config.encoder_embed_dim
        self.self_attn = _GatedAttention(width, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.encoder_ffn_embed_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_embed_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.activation = ACTIVATIONS[config.activation_fn]
        self.residual = (2 * config.encoder_layers) ** 0.25 if config.deep_norm else 1.0

    def forward(self, x: torch.Tensor, bias: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        x = self.self_attn_layer_norm(x * self.residual + self.self_attn(x, bias, padding))
        return self.final_layer_norm(x * self.residual + self.fc2(self.activation(self.fc1(x))))


class _GatedAttention(nn.Module):
    """Self-attention whose relative position bias each query gates for itself (WavLM, equation 2)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.grep_linear = nn.Linear(width // heads, 8)
        self.grep_a = nn.Parameter(torch.ones(1, heads, 1, 1))
        self.relative_attention_bias: nn.Embedding

    def forward(self, x: torch.Tensor, bias: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        """x [B, N, D], bias [heads, N, N], padding [B, N] bool or None to [B, N, D]."""
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        update, reset = self.grep_linear(q).unflatten(-1, (2, 4)).sum(-1).sigmoid().chunk(2, dim=-1)
        scores = (update * (reset * self.grep_a - 1.0) + 2.0) * bias
        if padding is not None:
            scores = scores.masked_fill_(padding[:, None, None, :], -torch.inf)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=scores)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class BeatsTower(FrozenTower):
    """Sounds. A window is ``window`` samples (30 s), the last one filled up with its last sample's value and masked; a
    window has one token for each patch (1496 x 768), those of padding included: the Q-Former of the published model
    reads them too. ``max_windows`` (10 minutes) caps a file, with a warning."""

    name = "beats"
    modality = "audio"
    chunk_elements = 4 * 2998 * (MEL_BANDS + 1)

    def __init__(self, network: Beats, window: int = WINDOW_SECONDS * SAMPLE_RATE, max_windows: int = MAX_WINDOWS):
        super().__init__(network, {"window": window, "max_windows": max_windows})
        self.window, self.max_windows = window, max_windows
        self.feature_dim = network.config.encoder_embed_dim

    def preprocess(self, media: np.ndarray) -> np.ndarray:
        """A waveform [samples] at 16 kHz to [W, frames, 129] float32: normalised log-mel bands, and 1 in the last
        column where a frame is padding. Raises UnimoeError when empty."""
        windows = torch.from_numpy(split_windows(media, self.window, self.max_windows, repeat_last=True))
        bands = normalised_fbank(windows)
        positions = torch.arange(windows.numel()).view_as(windows)
        padding = reduce_padding(positions >= len(media), bands.shape[1])
        return torch.cat([bands, padding[..., None].float()], dim=-1).numpy()

    def tokens_for(self, media: np.ndarray) -> list[int]:
        """Tokens of each window."""
        windows = count_windows(len(media), self.window, self.max_windows)
        return [self.network.patches_of(frames_of(self.window))] * windows

    def encode(self, windows: torch.Tensor) -> torch.Tensor:
        """[B, frames, 129] to [B, N, D]."""
        return self.network(windows[..., :MEL_BANDS], windows[..., MEL_BANDS] > 0)


def normalised_fbank(waveforms: torch.Tensor) -> torch.Tensor:
    """What BEATs is fed: [..., samples] at 16 kHz to [..., frames, 128] of about unit scale."""
    return (fbank(waveforms, MEL_BANDS) - MEAN) / DEVIATION


def load_beats(checkpoint: Mapping[str, Any]) -> Beats:
    """The encoder of a published checkpoint ``{cfg, model}``, as torch.load with weights_only gives it.

    Raises ValueError for another layout or variant, RuntimeError (naming the tensors) when weights do not fit.
    """
    if not {"cfg", "model"} <= checkpoint.keys():
        raise ValueError(f"a BEATs checkpoint holds cfg and model; this one holds {', '.join(sorted(checkpoint))}")
    network = Beats(BeatsConfig.from_published(checkpoint["cfg"]))
    network.load_state_dict(checkpoint["model"])
    return network
