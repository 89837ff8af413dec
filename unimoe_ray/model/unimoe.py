"""Uni-MoE: connectors and a (sparse) language model over features of frozen towers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from unimoe_ray.config.model import IGNORE_INDEX, PLACEHOLDER_IDS, TOKEN_KINDS, ModelConfig
from unimoe_ray.errors import UnimoeError
from unimoe_ray.model.connectors import build_connectors
from unimoe_ray.model.features import Features
from unimoe_ray.model.language import RoutingRecorder, build_llama, upcycle
from unimoe_ray.model.splice import splice


@dataclass
class Packing:
    """Several samples to a row, each of which attends to itself only.

    positions [B, S] int64: place of each token in its sample; padding goes on counting
    samples: how many there are; longest: tokens of the longest
    """

    positions: torch.Tensor
    samples: int
    longest: int


@dataclass
class Batch:
    """One micro-batch, padded on the right (training) or on the left (generation).

    input_ids [B, S] int64: text ids and one placeholder id per soft token; 0 in padding
    mask      [B, S] bool: False in padding
    labels    [B, S] int64: the token itself where it is an answer's, else -100
    features  per modality: windows of all files, in the order of their placeholders
    packing   None: a row is a sample
    """

    input_ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    features: dict[str, Features] = field(default_factory=dict)
    packing: Packing | None = None

    def to(self, device: torch.device | str) -> Batch:
        features = {modality: f.to(device) for modality, f in self.features.items()}
        packing = self.packing and replace(self.packing, positions=self.packing.positions.to(device))
        return Batch(self.input_ids.to(device), self.mask.to(device), self.labels.to(device), features, packing)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample, padding of its row included where it has one to itself."""
        return self.input_ids.shape[1] if self.packing is None else self.packing.longest

    @property
    def samples(self) -> int:
        return len(self.input_ids) if self.packing is None else self.packing.samples

    def owners(self) -> torch.Tensor:
        """The sample, by number, of each token that is none of padding: int64."""
        if self.packing is None:
            return self.mask.nonzero()[:, 0]
        return (self.packing.positions == 0)[self.mask].cumsum(0) - 1


def to_batch(arrays: dict[str, np.ndarray]) -> Batch:
    """Collated arrays (``data.batch.collate``) to tensors; features in fp32."""
    features = {
        kind: Features(
            torch.from_numpy(arrays[f"{kind}.values"]).float(),
            torch.from_numpy(arrays[f"{kind}.lengths"]),
            torch.from_numpy(arrays[f"{kind}.owner"]),
        )
        for kind in PLACEHOLDER_IDS
        if f"{kind}.values" in arrays
    }
    ids, mask, labels = (torch.from_numpy(arrays[name]) for name in ("input_ids", "mask", "labels"))
    if (positions := arrays.get("positions")) is None:
        return Batch(ids, mask, labels, features)
    longest = int(positions[arrays["mask"]].max()) + 1
    samples = int((arrays["mask"] & (positions == 0)).sum())
    return Batch(ids, mask, labels, features, Packing(torch.from_numpy(positions), samples, longest))


def token_kinds(input_ids: torch.Tensor) -> torch.Tensor:
    """Index in ``TOKEN_KINDS`` of each id, of text or of a placeholder: int64 of the same shape."""
    kinds = torch.zeros_like(input_ids)
    for kind, placeholder in PLACEHOLDER_IDS.items():
        kinds = kinds.masked_fill(input_ids == placeholder, TOKEN_KINDS.index(kind))
    return kinds


@dataclass
class Loss:
    """token_loss: sum of the answer tokens' cross-entropies; router_loss: weighted balance and z-losses of the
    mixture layers over the whole group (``RoutingRecorder.loss``), or 0."""

    token_loss: torch.Tensor
    answer_tokens: torch.Tensor
    router_loss: torch.Tensor | float


class UniMoE(nn.Module):
    """``language`` (Hugging Face LLaMA) and ``connectors`` by modality. Towers stay outside: they are frozen in every
    stage, so their features are computed once and stored.

    feature_dims: feature dim D of each modality's tower
    llama: architecture of a language model whose weights are loaded afterwards, or never on the meta device; without
        it, the language model is the one that the configuration names
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        feature_dims: dict[str, int],
        llama: LlamaConfig | None = None,
    ):
        super().__init__()
        self.config = config
        self.recorder = RoutingRecorder()
        self.language = build_llama(config.language, vocab_size) if llama is None else LlamaForCausalLM(llama)
        self.connectors = build_connectors(feature_dims, self.language.config.hidden_size, config)

    @property
    def max_positions(self) -> int:
        """The longest sequence, soft tokens and answer included."""
        return min(self.config.language.max_positions, self.language.config.max_position_embeddings)

    def make_sparse(self) -> None:
        """Upcycle the language model to the configured mixture (copies of its own feed-forward layers)."""
        moe, llama = self.config.moe, self.language
        upcycle(llama, moe.sparse_layers(llama.config.num_hidden_layers), moe.num_experts, moe.top_k, self.recorder)

    @torch.no_grad()
    def match_text_rms(self) -> None:
        """Set the connectors' output scale to the mean RMS of the text embeddings."""
        rms = self.language.get_input_embeddings().weight.float().pow(2).mean(dim=-1).sqrt().mean()
        for connector in self.connectors.values():
            connector.scale.copy_(rms)

    def embed(self, batch: Batch) -> torch.Tensor:
        """Input embeddings [B, S, H] with the soft tokens spliced in."""
        anchor = self._anchor()
        embeddings = self.language.get_input_embeddings()(batch.input_ids.clamp(min=0))
        if anchor is not None:
            embeddings = embeddings + anchor
        soft = {m: self.connectors[m](features) for m, features in batch.features.items()}
        return splice(embeddings, batch.input_ids, soft)

    def forward(self, batch: Batch) -> Loss:
        """Loss of a right-padded batch. Padding is to the right of every token, so causal attention never sees it
        and no attention mask is needed. Where rows are packed, positions that start again tell transformers where a
        sample ends: it makes the block-diagonal mask (or has flash attention leave it out, of a single row). Raises
        UnimoeError when a sample is longer than ``max_positions``."""
        self._check_length(batch, 0)
        hidden = self.hidden_states(batch)
        targets = batch.labels[:, 1:].reshape(-1)
        index = (targets != IGNORE_INDEX).nonzero().squeeze(-1)
        answers = hidden[:, :-1].reshape(-1, hidden.shape[-1])[index]
        logits = self.language.get_output_embeddings()(answers)
        loss = F.cross_entropy(logits.float(), targets[index], reduction="sum")
        return Loss(loss, index.new_tensor(len(index)), self.recorder.loss(self.config.moe))

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """Of the last layer, [B, S, H], of a right-padded batch; the recorder has what its routers did."""
        embeddings = self.embed(batch)
        kinds = token_kinds(batch.input_ids[batch.mask])
        self.recorder.start(batch.mask.reshape(-1), kinds, batch.owners(), batch.samples)
        positions = None if batch.packing is None else batch.packing.positions
        decoder = self.language.get_decoder()
        return decoder(inputs_embeds=embeddings, position_ids=positions, use_cache=False).last_hidden_state

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int, eos_token_id: int) -> torch.Tensor:
        """Greedy answers with a KV cache for a left-padded batch of prompts: [B, <= max_new_tokens] ids, 0-padded.
        Raises UnimoeError when prompt and answer may become longer than ``max_positions``."""
        self._check_length(batch, max_new_tokens)
        self.recorder.start(None)
        return self.language.generate(
            inputs_embeds=self.embed(batch),
            attention_mask=batch.mask.long(),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=eos_token_id,
            pad_token_id=0,
        )

    def _check_length(self, batch: Batch, new_tokens: int) -> None:
        length = batch.longest
        if length + new_tokens > self.max_positions:
            answer = f" and {new_tokens} kept for the answer" if new_tokens else ""
            raise UnimoeError(f"{length} tokens with media{answer}; the model takes at most {self.max_positions}")

    def _anchor(self) -> torch.Tensor | None:
        """Zero, touching every trainable connector before the main path: ranks whose batch lacks a modality must
        still produce its gradients, in the same order, or ZeRO reduces the wrong buffers silently."""
        parameters = [p for p in self.connectors.parameters() if p.requires_grad]
        return 0.0 * sum(p.sum() for p in parameters) if parameters else None
