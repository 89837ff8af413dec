"""Prompts that begin alike, and the two ways a pass is computed: compiled, or by torch."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.unit.test_engine import (
    HIDDEN,
    MODEL,
    NEW,
    TOKENIZER,
    config,
    make_arena,
    make_model,
    make_request,
    offline,
    run,
    tokens_of,
)
from unimoe_ray.config.model import PLACEHOLDER_IDS
from unimoe_ray.inference.engine import Engine
from unimoe_ray.inference.forward import Span, TorchDecoder
from unimoe_ray.inference.kv_cache import Extent
from unimoe_ray.inference.native import NativeDecoder
from unimoe_ray.inference.request import GenerationRequest, SamplingParams
from unimoe_ray.kernels.library import KernelUnavailable, library

# Prompts that begin alike


def shared_beginning() -> tuple[list[int], list[np.ndarray]]:
    """30 ids, the ninth a picture of 7 soft tokens."""
    soft = np.random.default_rng(1).normal(0, 0.5, (7, HIDDEN)).astype(np.float32)
    return [1, *range(40, 47), PLACEHOLDER_IDS["image"], *range(60, 81)], [soft]


def answer_exactly(engine: Engine, request: GenerationRequest) -> list:
    return run(engine, [replace(request, params=replace(request.params, logprobs=2))])[request.id]


@pytest.mark.parametrize("running", [False, True], ids=["after it has left", "while it runs"])
def test_what_prompts_share_is_computed_once(running):
    """Same tokens, log probabilities to the bit and expert counts as without anything to share."""
    ids, soft = shared_beginning()
    first = GenerationRequest("first", [*ids, 9, 3], soft, SamplingParams(40 if running else NEW, 1.0, seed=1))
    second = GenerationRequest("second", [*ids, 10, 11, 3], soft, SamplingParams(NEW))
    engine = Engine(MODEL, TOKENIZER, config(max_step_tokens=64))
    engine.add(engine.start(first))
    while engine.has_work and not (running and engine.stats()["generated_tokens"] > 3):
        engine.step()
    assert bool(engine.running) == running
    outputs = answer_exactly(engine, second)
    assert engine.stats()["reused_tokens"] == 36  # ids and soft tokens before the first that differs
    fresh = answer_exactly(Engine(MODEL, TOKENIZER, config(max_step_tokens=5)), second)
    assert tokens_of(outputs) == tokens_of(fresh) == offline(MODEL, second)
    assert [output.logprobs for output in outputs] == [output.logprobs for output in fresh]
    assert (outputs[-1].expert_load == fresh[-1].expert_load).all()


def test_other_media_are_not_taken_for_the_same():
    """The ids are the same; what the picture shows is not."""
    ids, soft = shared_beginning()
    engine = Engine(MODEL, TOKENIZER, config(max_step_tokens=64))
    changed = soft[0].copy()
    changed[-1, 0] += 1
    requests = [
        GenerationRequest("a", [7] * 16 + ids, soft, SamplingParams(NEW)),
        GenerationRequest("b", [7] * 16 + ids, [changed], SamplingParams(NEW)),
    ]
    for request in requests:
        outputs = run(engine, [request])[request.id]
        assert tokens_of(outputs) == offline(MODEL, request)
    assert engine.stats()["reused_tokens"] == 16 + 8


def test_the_whole_prompt_again_feeds_its_last_token_only():
    ids, soft = shared_beginning()
    engine = Engine(MODEL, TOKENIZER, config(max_step_tokens=64))
    request = GenerationRequest("a", ids, soft, SamplingParams(NEW))
    first, again = (tokens_of(run(engine, [request])["a"]) for _ in range(2))
    assert first == again and engine.stats()["reused_tokens"] == 35
    assert engine.stats()["prompt_tokens"] == 36 + 1


def test_kept_prefixes_make_room():
    """A budget of 100 tokens: what is kept of earlier requests goes when a new one needs its room, the oldest first."""
    engine = Engine(MODEL, TOKENIZER, config(kv_tokens=100, max_step_tokens=64))
    rng = random.Random(1)
    for number in range(20):
        ids = [1, *(rng.randint(4, 250) for _ in range(rng.randint(20, 60)))]
        request = GenerationRequest(str(number), ids, [], SamplingParams(NEW))
        assert tokens_of(run(engine, [request])[str(number)]) == offline(MODEL, request)
        assert engine.stats()["kv_tokens_used"] == 0
    assert 0 < len(engine.prefixes) < 5
    while len(engine.prefixes):
        engine.arena.release(engine.prefixes.drop_oldest())
    assert engine.arena.allocate(100) == Extent(0, 100)


# Compiled or not


def test_without_a_compiler_torch_answers_and_it_is_said(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    library.cache_clear()
    try:
        engine = Engine(MODEL, TOKENIZER, config())
    finally:
        library.cache_clear()
    assert isinstance(engine.decoder, TorchDecoder)
    assert "without the compiled kernel" in caplog.text and "/nowhere/g++" in caplog.text
    requests = [make_request(i, random.Random(i)) for i in range(4)]
    for name, outputs in run(engine, requests, [0, 2, 3, 7]).items():
        assert tokens_of(outputs) == offline(MODEL, requests[int(name)])


def test_a_model_that_the_kernel_does_not_know_is_left_to_torch(caplog):
    model = make_model()
    attention = model.language.model.layers[1].self_attn
    attention.o_proj = torch.nn.Linear(HIDDEN, HIDDEN, bias=True)
    request = make_request(0, random.Random(0))
    engine = Engine(model.eval(), TOKENIZER, config())
    assert "biases" in caplog.text
    assert tokens_of(run(engine, [request])["0"]) == offline(model, request)


@pytest.mark.parametrize(("dtype", "quantize", "error"), [(torch.bfloat16, False, 0.02), (torch.float32, True, 0.04)])
def test_weights_of_fewer_bits(dtype, quantize, error):
    """In bf16 only weights and cache are rounded, in int8 only weights: logits stay near those in fp32."""
    embeddings = torch.randn(30, HIDDEN, generator=torch.Generator().manual_seed(1))
    spans, rows = [Span(3, 0, 30)], list(range(30))
    exact, _ = TorchDecoder(MODEL, make_arena())(embeddings, spans, rows)
    model = make_model().to(dtype)
    arena = make_arena()
    for of_layers in (arena.keys, arena.values):
        of_layers[:] = [values.to(dtype) for values in of_layers]
    logits, _ = NativeDecoder(model, arena, quantize)(embeddings, spans, rows)
    off = (logits - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert 0 < off.median() < error  # a token that is routed elsewhere is further off


def test_int8_is_a_setting(monkeypatch):
    """Answers do not depend on company there either; without the kernel there is no int8."""
    requests = [make_request(i, random.Random(i)) for i in range(6)]
    engine = Engine(MODEL, TOKENIZER, config(precision="int8"))
    together = run(engine, requests, [0, 0, 1, 3, 5, 8])
    for request in requests:
        alone = run(Engine(MODEL, TOKENIZER, config(precision="int8")), [request])[request.id]
        assert tokens_of(together[request.id]) == tokens_of(alone)
    exact = run(Engine(MODEL, TOKENIZER, config()), requests)
    same = [tokens_of(exact[name])[:1] == tokens_of(outputs)[:1] for name, outputs in together.items()]
    assert sum(same) >= 5
    monkeypatch.setenv("CXX", "/nowhere/g++")
    library.cache_clear()
    try:
        with pytest.raises(KernelUnavailable, match="/nowhere/g"):
            Engine(MODEL, TOKENIZER, config(precision="int8"))
    finally:
        library.cache_clear()
