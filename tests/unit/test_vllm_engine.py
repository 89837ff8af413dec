"""vLLM behind our interface. ``UNIMOE_VLLM=FOLDER`` names its environment, which ``serve/vllm_env.sh`` makes."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open

from tests.tiny import DIMS, tiny_config
from tests.unit.test_engine import TOKENIZER, tokens_of
from unimoe_ray.config.model import MODALITIES, PLACEHOLDER_IDS
from unimoe_ray.config.serving import EngineConfig, ServingConfig
from unimoe_ray.errors import UnimoeError
from unimoe_ray.inference.engine import Engine
from unimoe_ray.inference.request import (
    Admitted,
    EngineBusy,
    EngineStopped,
    GenerationRequest,
    RequestRefused,
    SamplingParams,
)
from unimoe_ray.inference.vllm_engine import VllmEngine, write_model
from unimoe_ray.model.unimoe import UniMoE

HIDDEN, NEW = 64, 24
FOLDER = os.environ.get("UNIMOE_VLLM")
with_vllm = [
    pytest.mark.skipif(FOLDER is None, reason="needs vLLM: UNIMOE_VLLM=FOLDER, made by serve/vllm_env.sh"),
    pytest.mark.slow,
    pytest.mark.timeout(300),
]


def make_model(layers: str) -> UniMoE:
    """Random weights; hidden size and heads are such as vLLM's kernels take."""
    torch.manual_seed(0)
    language = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_layers": 3, "num_heads": 2, "num_kv_heads": 1}
    tree = tiny_config(
        Path("."), model={"language": language | {"max_positions": 128}, "moe": {"layers": layers}}
    ).model
    model = UniMoE(tree, TOKENIZER.get_vocab_size(), DIMS)
    model.make_sparse()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.25)
    return model.eval()


def make_requests(count: int, **params) -> list[GenerationRequest]:
    """Ragged prompts, half of them with a file."""
    rng, requests = random.Random(0), []
    for number in range(count):
        ids, soft = [1, *[rng.randint(4, 250) for _ in range(rng.randint(1, 50))]], []
        if number % 2:
            ids.insert(rng.randint(1, len(ids)), PLACEHOLDER_IDS[rng.choice(MODALITIES)])
            noise = np.random.default_rng(number).normal(0, 0.3, (rng.randint(1, 20), HIDDEN))
            soft.append(noise.astype(np.float32))
        wanted = SamplingParams(**{"max_new_tokens": NEW} | params)
        requests.append(GenerationRequest(str(number), [*ids, 3], soft, wanted))
    return requests


def config(**changes) -> EngineConfig:
    python = f"{FOLDER}/bin/python" if FOLDER else sys.executable
    return EngineConfig(**{"backend": "vllm", "vllm_python": python, "max_running": 4} | changes)


def ours(model: UniMoE, requests: list[GenerationRequest]) -> tuple[dict[str, list], np.ndarray]:
    """Outputs of each request by our engine, and routed slots [L, E]."""
    engine = Engine(model, TOKENIZER, EngineConfig(max_running=4))
    outputs: dict[str, list] = {request.id: [] for request in requests}
    for request in requests:
        engine.add(engine.start(request))
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
    return outputs, engine.expert_load.sum(axis=0)


async def ask(engine: VllmEngine, request: GenerationRequest) -> list:
    admitted, *outputs = [item async for item in engine.generate(request)]
    spliced = sum(map(len, request.soft_tokens)) + sum(token >= 0 for token in request.ids)
    assert admitted == Admitted(spliced, request.params.max_new_tokens)
    return outputs


@pytest.mark.parametrize("layers", [pytest.param(name, marks=with_vllm) for name in ("all", "interval")])
def test_answers_are_those_of_our_engine(layers):
    """Tokens, texts, reasons, log probabilities and expert counts of greedy requests, all at once; then stop strings,
    an answer that goes on, one that is left, seeds, and that bad input does no harm."""
    model = make_model(layers)
    requests = make_requests(10, logprobs=2)
    expected, routed = ours(model, requests)

    async def main() -> None:
        engine = VllmEngine(model, TOKENIZER, config())
        answers = await asyncio.gather(*(ask(engine, request) for request in requests))
        for request, outputs in zip(requests, answers, strict=True):
            right = expected[request.id]
            assert tokens_of(outputs) == tokens_of(right)
            assert "".join(o.text for o in outputs) == "".join(o.text for o in right)
            assert outputs[-1].finish_reason == right[-1].finish_reason
            found, told = ([p for o in parts for p in o.logprobs] for parts in (outputs, right))
            assert [p.token for p in found] == [p.token for p in told]
            np.testing.assert_allclose([p.logprob for p in found], [p.logprob for p in told], atol=2e-3)
            assert [[name for name, _ in p.top] for p in found] == [[name for name, _ in p.top] for p in told]
        assert routed.shape[0] == {"all": 3, "interval": 2}[layers]
        assert (engine.routed == routed).all() and engine.stats()["routed"] == routed.tolist()

        first = replace(requests[0], id="on", params=SamplingParams(NEW), generated=tuple(tokens_of(answers[0])[:7]))
        assert tokens_of(await ask(engine, first)) == tokens_of(answers[0])[7:]
        leaving = engine.generate(replace(requests[1], id="leaves"))
        await anext(leaving), await anext(leaving)
        await leaving.aclose()
        params = SamplingParams(NEW, temperature=1.0, seed=3)
        drawn = [await ask(engine, replace(requests[2], id=f"seed{n}", params=params)) for n in range(2)]
        assert tokens_of(drawn[0]) == tokens_of(drawn[1]) != tokens_of(answers[2])
        for soft in (np.zeros((3, HIDDEN // 2), np.float32), np.full((3, HIDDEN), np.nan, np.float32)):
            with pytest.raises(RequestRefused, match="soft tokens"):
                await anext(engine.generate(GenerationRequest("bad", [1, PLACEHOLDER_IDS["image"]], [soft])))
        assert tokens_of(await ask(engine, replace(requests[3], id="after"))) == tokens_of(answers[3])
        stats = engine.stats()
        assert (stats["finished"], stats["cancelled"], stats["running"], stats["waiting"]) == (14, 1, 0, 0)
        engine.check()
        engine._process.kill()
        with pytest.raises(RuntimeError, match="has stopped"):
            while True:
                engine.check()
                await asyncio.sleep(0.05)
        engine.close()

    asyncio.run(main())


@pytest.mark.parametrize("layers", [pytest.param("all", marks=with_vllm)])
def test_stop_strings_too_many_and_a_process_that_dies(layers):
    model = make_model(layers)
    requests = make_requests(3)
    expected, _ = ours(model, requests)

    async def main() -> None:
        engine = VllmEngine(model, TOKENIZER, config(max_running=1, max_waiting=1))
        text = "".join(output.text for output in expected["0"])
        stop = text[len(text) // 2 :][:2]
        stopped = await ask(engine, replace(requests[0], params=SamplingParams(NEW, stop=(stop,))))
        assert "".join(output.text for output in stopped) == text[: text.index(stop)].strip()
        assert stopped[-1].finish_reason == "stop"
        long = SamplingParams(70, temperature=1.0, seed=1)
        first, second = (engine.generate(replace(request, params=long)) for request in requests[:2])
        await anext(first), await anext(second)
        with pytest.raises(EngineBusy, match="try again later"):
            await anext(engine.generate(requests[2]))
        engine._process.kill()
        with pytest.raises(EngineStopped, match="has stopped"):
            async for _ in first:
                pass
        await second.aclose()
        engine.close()

    asyncio.run(main())


def test_what_the_plugin_reads(tmp_path):
    """Names of the official checkpoints, and which layers are mixtures."""
    model = make_model("interval")
    write_model(model, tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    assert (tree["moe_layers"], tree["num_local_experts"], tree["num_experts_per_tok"]) == ([0, 2], 4, 2)
    assert tree["architectures"] == ["UniMoELlamaForCausalLM"] and tree["hidden_size"] == HIDDEN
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert {"model.layers.2.mlp.experts.3.up_proj.weight", "model.layers.1.mlp.up_proj.weight"} <= names
    assert (tmp_path / "unimoe_vllm" / "worker.py").exists()


def test_a_python_without_vllm_is_said():
    with pytest.raises(UnimoeError, match="vLLM did not start .*No module named 'vllm'"):
        VllmEngine(make_model("all"), TOKENIZER, config(vllm_python=sys.executable))
    with pytest.raises(UnimoeError, match="vllm_python: /nowhere can't be run"):
        VllmEngine(make_model("all"), TOKENIZER, config(vllm_python="/nowhere"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"engine": {"backend": "vllm"}}, "vllm_python is not given"),
        ({"engine": {"backend": "vllm", "vllm_python": "p", "lookup_tokens": 2}}, "lookup_tokens is 2; allowed"),
        ({"engine": {"backend": "vllm", "vllm_python": "p", "precision": "int8"}}, "precision is int8; allowed"),
        ({"engine": {"precision": "int8"}, "language": {"num_gpus": 1}}, "int8; allowed on CPUs"),
        ({"engine": {"precision": "int8"}, "language": {"expert_parallel": {"size": 2}}}, "int8; allowed on CPUs"),
        (
            {"engine": {"backend": "vllm", "vllm_python": "p"}, "language": {"expert_parallel": {"size": 2}}},
            "expert_parallel.size is 2; allowed with engine.backend vllm: 0",
        ),
    ],
)
def test_settings_that_do_not_go_together(changes, reason):
    with pytest.raises(ValidationError, match=reason):
        ServingConfig(**changes)
