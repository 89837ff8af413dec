"""The decoder on CPUs: one call of a compiled kernel per pass, over weights packed as it reads them."""

from __future__ import annotations

import ctypes
import logging
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p

import numpy as np
import torch
from torch import nn
from transformers.activations import ACT2FN

from unimoe_ray.inference.forward import Decoder, Span, TorchDecoder
from unimoe_ray.inference.kv_cache import KVArena
from unimoe_ray.kernels.library import KernelUnavailable, library
from unimoe_ray.model.experts import SwiGLU
from unimoe_ray.model.language import SparseFeedForward
from unimoe_ray.model.unimoe import UniMoE

logger = logging.getLogger(__name__)
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
MAX_EXPERTS = 256  # as decoder.cpp has it
# Weights begin at cache lines, so that no vector lies in two, and lie in slabs large enough for huge pages.
ALIGNED, SLAB = 64, 64 << 20


class _Weights(Structure):
    _fields_ = [("data", c_void_p), ("scale", c_void_p)]


class _Layer(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("input_norm", "post_norm", "router")),
        ("qkv", _Weights),
        ("out", _Weights),
        ("gate_up", POINTER(_Weights)),
        ("down", POINTER(_Weights)),
        ("keys", c_void_p),
        ("values", c_void_p),
        *((name, c_int32) for name in ("experts", "top_k", "inner", "pad")),
    ]


class _Model(Structure):
    _fields_ = [
        ("layers", POINTER(_Layer)),
        *((name, c_void_p) for name in ("final_norm", "cos", "sin")),
        ("head", _Weights),
        *((name, c_int32) for name in ("num_layers", "hidden", "heads", "kv_heads", "head_dim", "vocab", "type")),
        ("cache_type", c_int32),
        ("eps", c_float),
        ("scaling", c_float),
    ]


class _Pass(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("embeddings", "starts", "positions", "ready", "logits", "chosen", "scratch")),
        *((name, c_int32) for name in ("tokens", "num_ready", "threads", "pad")),
    ]


def make_decoder(model: UniMoE, arena: KVArena, quantize: bool = False, keep_weights: bool = True) -> Decoder:
    """The compiled decoder where there can be one, else, with a line in the log that says why, that of torch.

    quantize: hold projections in int8, with a scale for each output; keep_weights: False takes the weights that it
    packs out of the model, which is of no use afterwards. Raises KernelUnavailable where int8 is wanted in vain.
    """
    try:
        return NativeDecoder(model, arena, quantize, keep_weights)
    except KernelUnavailable as reason:
        if quantize:
            raise
        if next(model.language.parameters()).device.type == "cpu":
            logger.warning("decoding without the compiled kernel, several times slower: %s", reason)
        return TorchDecoder(model, arena)


class NativeDecoder:
    """Same bits for a sequence in any company and in chunks of any size. fp32 but for the weights, in fp32, bf16 or
    int8, and the cache, in fp32 or bf16. Raises KernelUnavailable for a model that the kernel can't run."""

    def __init__(self, model: UniMoE, arena: KVArena, quantize: bool = False, keep_weights: bool = True):
        language = model.language
        decoder, config = language.get_decoder(), language.config
        head = language.get_output_embeddings()
        _check(model)
        self._library = library("decoder")
        self._library.scratch_bytes.restype = c_int64
        self._vector = self._library.vector_length()
        self._type = torch.int8 if quantize else head.weight.dtype
        self._kept: list[torch.Tensor | ctypes.Array] = [*arena.keys, *arena.values]
        self._slab, self._used = torch.empty(0, dtype=torch.uint8), 0
        self._hidden, self._vocab = config.hidden_size, len(head.weight)
        self._sparse = [layer.mlp.top_k for layer in decoder.layers if isinstance(layer.mlp, SparseFeedForward)]
        cos, sin = decoder.rotary_emb(torch.empty(1), torch.arange(model.max_positions)[None])
        layers = (_Layer * len(decoder.layers))()
        for index, layer in enumerate(decoder.layers):
            self._fill(layers[index], layer, arena.keys[index], arena.values[index])
            if not keep_weights:
                _drop(layer)
        self._model = _Model(
            layers,
            self._array(decoder.norm.weight),
            self._array(cos[0]),
            self._array(sin[0]),
            self._weights(self._panels(head.weight)),
            num_layers=len(layers),
            hidden=self._hidden,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=decoder.layers[0].self_attn.head_dim,
            vocab=self._vocab,
            type=TYPES[self._type],
            cache_type=TYPES[arena.keys[0].dtype],
            eps=config.rms_norm_eps,
            scaling=decoder.layers[0].self_attn.scaling,
        )
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def __call__(
        self, embeddings: torch.Tensor, spans: list[Span], ready: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        counts = [span.count for span in spans]
        starts = np.array([span.start for span in spans], np.int32)
        positions = np.array([span.cached for span in spans], np.int32)
        if len(embeddings) > len(spans):
            starts, first = starts.repeat(counts), np.cumsum([0, *counts[:-1]], dtype=np.int32)
            positions = np.arange(len(embeddings), dtype=np.int32) + (positions - first).repeat(counts)
        tokens, longest = len(embeddings), max(span.cached + span.count for span in spans)
        rows, threads = np.array(ready, np.int32), torch.get_num_threads()
        embeddings = embeddings.float().contiguous()
        logits = torch.empty(len(ready), self._padded(self._vocab))
        chosen = torch.empty(sum(self._sparse) * tokens, dtype=torch.int32)
        scratch = self._room(tokens, len(ready), longest, threads)
        task = _Pass(
            embeddings.data_ptr(),
            starts.ctypes.data,
            positions.ctypes.data,
            rows.ctypes.data,
            logits.data_ptr(),
            chosen.data_ptr(),
            scratch,
            tokens,
            len(ready),
            threads,
        )
        self._library.forward(ctypes.byref(self._model), ctypes.byref(task), longest)
        shape = (len(self._sparse), tokens, self._sparse[0] if self._sparse else 1)
        return logits[:, : self._vocab], chosen.view(shape)

    def _room(self, tokens: int, ready: int, longest: int, threads: int) -> int:
        """Address of enough scratch memory, aligned to cache lines."""
        needed = self._library.scratch_bytes(ctypes.byref(self._model), tokens, ready, longest, threads) + 64
        if needed > len(self._scratch):
            self._scratch = torch.empty(needed, dtype=torch.uint8)
        return (self._scratch.data_ptr() + 63) // 64 * 64

    def _fill(self, to: _Layer, layer: nn.Module, keys: torch.Tensor, values: torch.Tensor) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        sparse = isinstance(mlp, SparseFeedForward)
        experts = list(mlp.experts) if sparse else [mlp]
        to.input_norm = self._array(layer.input_layernorm.weight)
        to.post_norm = self._array(layer.post_attention_layernorm.weight)
        to.router = self._array(mlp.gate.weight) if sparse else None
        qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        to.qkv = self._weights(self._panels(torch.cat([projection.weight for projection in qkv])))
        to.out = self._weights(self._panels(attention.o_proj.weight))
        gate_up = [self._panels(expert.gate_proj.weight, expert.up_proj.weight) for expert in experts]
        to.gate_up = self._array_of(list(map(self._weights, gate_up)))
        to.down = self._array_of([self._weights(self._panels(expert.down_proj.weight)) for expert in experts])
        to.keys, to.values = keys.data_ptr(), values.data_ptr()
        to.experts, to.top_k = len(experts), mlp.top_k if sparse else 1
        to.inner = len(experts[0].gate_proj.weight)

    def _padded(self, n: int) -> int:
        return -n % (2 * self._vector) + n

    def _panels(self, *weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One or two [N, K] as pairs of panels [P, K, 2 * vector], two as one panel of each; with a scale of each
        output [P * 2 * vector] if in int8."""
        width = 2 * self._vector // len(weights)
        length = -(-len(weights[0]) // width) * width
        parts = [nn.functional.pad(weight.detach(), (0, 0, 0, length - len(weight))) for weight in weights]
        pairs = torch.cat([part.view(-1, width, part.shape[1]) for part in parts], dim=1)
        scale = None
        if self._type is torch.int8:
            scale = pairs.float().abs().amax(dim=-1).clamp(min=1e-30) / 127
            pairs = (pairs.float() / scale[..., None]).round()
            scale = scale.flatten()
        return pairs.transpose(1, 2).to(self._type), scale

    def _weights(self, panels: tuple[torch.Tensor, torch.Tensor | None]) -> _Weights:
        data, scale = panels
        nbytes = data.numel() * data.itemsize
        if nbytes > len(self._slab) - self._used:
            self._slab, self._used = torch.empty(max(nbytes + ALIGNED, SLAB), dtype=torch.uint8), 0
            self._library.want_huge_pages(c_void_p(self._slab.data_ptr()), c_int64(len(self._slab)))
            self._kept.append(self._slab)
            self._used = -self._slab.data_ptr() % ALIGNED
        kept = self._slab[self._used : self._used + nbytes].view(data.dtype)
        kept.view(data.shape).copy_(data)
        self._used += -(-nbytes // ALIGNED) * ALIGNED
        return _Weights(kept.data_ptr(), None if scale is None else self._array(scale))

    def _array(self, values: torch.Tensor) -> int:
        values = values.detach().float().clone(memory_format=torch.contiguous_format)
        self._kept.append(values)
        return values.data_ptr()

    def _array_of(self, weights: list[_Weights]) -> ctypes.Array:
        array = (_Weights * len(weights))(*weights)
        self._kept.append(array)
        return array


def _check(model: UniMoE) -> None:
    language = model.language
    decoder, head = language.get_decoder(), language.get_output_embeddings()
    if head.weight.device.type != "cpu":
        raise KernelUnavailable("the kernel is for CPUs")
    if head.weight.dtype not in (torch.float32, torch.bfloat16):
        raise KernelUnavailable(f"weights in {head.weight.dtype}; it takes fp32 and bf16")
    silu = type(ACT2FN["silu"])
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        sparse = isinstance(mlp, SparseFeedForward)
        if sparse and len(mlp.experts) < mlp.num_experts:
            raise KernelUnavailable("experts in other processes")
        if sparse and mlp.num_experts > MAX_EXPERTS:
            raise KernelUnavailable(f"{mlp.num_experts} experts; it takes {MAX_EXPERTS}")
        experts = list(mlp.experts) if sparse else [mlp]
        projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        for expert in experts:
            if not isinstance(expert, SwiGLU) and not isinstance(expert.act_fn, silu):
                raise KernelUnavailable(f"feed-forward layers with {language.config.hidden_act}; it takes silu")
            projections += [expert.gate_proj, expert.up_proj, expert.down_proj]
        if any(type(p) is not nn.Linear or p.bias is not None for p in [*projections, head]):
            raise KernelUnavailable("projections with biases or adapters")


def _drop(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.data = parameter.data.new_empty(0)
