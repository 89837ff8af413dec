"""Continuous batching against plain generation with Hugging Face's cache: the same tokens, whatever the company."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import DIMS, VOCAB, tiny_config
from unimoe_ray.config.model import MODALITIES, PLACEHOLDER_IDS
from unimoe_ray.config.serving import EngineConfig
from unimoe_ray.data.store import StoredFeatures
from unimoe_ray.data.tokenizer import train_tokenizer
from unimoe_ray.inference.engine import Engine
from unimoe_ray.inference.forward import Span, TorchDecoder
from unimoe_ray.inference.kv_cache import Extent, KVArena
from unimoe_ray.inference.native import NativeDecoder
from unimoe_ray.inference.request import KINDS, GenerationRequest, RequestRefused, SamplingParams
from unimoe_ray.inference.sampling import Row, sample, top_logprobs, uniform
from unimoe_ray.inference.soft_tokens import soft_tokens
from unimoe_ray.model.unimoe import Batch, UniMoE

TOKENIZER = train_tokenizer(["one two three four five"], VOCAB)
HIDDEN = 16
NEW = 12


def make_model(sparse: bool = True, seed: int = 0) -> UniMoE:
    """Random weights, large enough that answers differ and no two logits are close."""
    torch.manual_seed(seed)
    model = UniMoE(tiny_config_model(), TOKENIZER.get_vocab_size(), DIMS)
    if sparse:
        model.make_sparse()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5)
    return model.eval()


def tiny_config_model():
    from pathlib import Path

    return tiny_config(Path("."), model={"language": {"max_positions": 96}}).model


MODEL = make_model()


def make_request(number: int, rng: random.Random, **params) -> GenerationRequest:
    """A prompt of text and up to two media files, with greedy sampling unless told otherwise."""
    ids, soft = [1], []
    for _ in range(rng.randint(0, 2)):
        kind = rng.choice(MODALITIES)
        ids += [*[rng.randint(4, 250) for _ in range(rng.randint(0, 4))], PLACEHOLDER_IDS[kind]]
        noise = np.random.default_rng(rng.randint(0, 9999)).normal(0, 0.5, (rng.randint(1, 9), HIDDEN))
        soft.append(noise.astype(np.float32))
    ids += [rng.randint(4, 250) for _ in range(rng.randint(1, 20))] + [3]
    return GenerationRequest(str(number), ids, soft, SamplingParams(**{"max_new_tokens": NEW} | params))


def offline(model: UniMoE, request: GenerationRequest) -> list[int]:
    """Hugging Face's greedy generation of one request alone, from the same spliced embeddings."""
    embed = model.language.get_input_embeddings()
    files = iter(request.soft_tokens)
    with torch.no_grad():
        parts = [torch.from_numpy(next(files)) if i < 0 else embed(torch.tensor([i])) for i in request.ids]
        out = model.language.generate(
            inputs_embeds=torch.cat(parts)[None],
            attention_mask=torch.ones(1, sum(map(len, parts)), dtype=torch.long),
            max_new_tokens=request.params.max_new_tokens,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=0,
        )
    ids = out[0].tolist()
    return ids[: ids.index(2) + 1] if 2 in ids else ids


def run(engine: Engine, requests: list[GenerationRequest], joins: list[int] | None = None) -> dict[str, list]:
    """Outputs of each request; request i joins before step ``joins[i]``."""
    outputs: dict[str, list] = {request.id: [] for request in requests}
    left = sorted(zip(joins or [0] * len(requests), range(len(requests)), strict=True))
    step = 0
    while left or engine.has_work:
        while left and left[0][0] <= step:
            engine.add(engine.start(requests[left.pop(0)[1]]))
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        step += 1
    return outputs


def tokens_of(outputs: list) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def config(**changes) -> EngineConfig:
    return EngineConfig(**{"max_running": 4, "max_step_tokens": 16} | changes)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("max_step_tokens", [1, 5, 16, 512])
def test_greedy_tokens_equal_generation_alone(sparse, max_step_tokens):
    """Requests join at different steps; prompts are prefilled in chunks of any size beside those that generate."""
    model = MODEL if sparse else make_model(sparse=False)
    rng = random.Random(max_step_tokens)
    requests = [make_request(i, rng) for i in range(14)]
    joins = [rng.randint(0, 40) for _ in requests]
    outputs = run(Engine(model, TOKENIZER, config(max_step_tokens=max_step_tokens)), requests, joins)
    for request in requests:
        assert tokens_of(outputs[request.id]) == offline(model, request)
        assert outputs[request.id][-1].finish_reason in ("stop", "length")
        assert all(output.finish_reason is None for output in outputs[request.id][:-1])


def make_arena(model: UniMoE = MODEL) -> KVArena:
    language = model.language.config
    return KVArena(language.num_hidden_layers, 64, language.num_key_value_heads, language.head_dim, torch.float32)


def logits_of(decoder, embeddings: torch.Tensor, chunks: list[int], company: bool) -> torch.Tensor:
    """Of all of the first 30 embeddings, fed in chunks; with company, beside another sequence's token each time."""
    parts, first = [], 0
    for count in chunks:
        rows, spans = embeddings[first : first + count], [Span(3, first, count)]
        if company:
            rows, spans = torch.cat([rows, embeddings[30 + first % 5 :][:1]]), [*spans, Span(40, first % 5, 1)]
        parts.append(decoder(rows, spans, list(range(count)))[0])
        first += count
    return torch.cat(parts)


@pytest.mark.parametrize("model", [MODEL, make_model(sparse=False)], ids=["sparse", "dense"])
def test_logits_do_not_depend_on_chunks_or_company(model):
    """To rounding with torch's products, to the bit with the kernel's; and both give the same."""
    embeddings = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(1))
    chunks = [[30], [7, 1, 17, 5], [1] * 30]
    plain, compiled = (
        [logits_of(make(model, make_arena(model)), embeddings, parts, len(parts) > 1) for parts in chunks]
        for make in (TorchDecoder, NativeDecoder)
    )
    for logits in (*plain[1:], *compiled):
        torch.testing.assert_close(logits, plain[0], atol=5e-5, rtol=1e-5)
    for logits in compiled[1:]:
        assert torch.equal(logits, compiled[0])


def test_a_model_in_bf16():
    """Weights, cache and soft tokens in bf16; logits and routing in fp32."""
    model = make_model().to(torch.bfloat16)
    engine = Engine(model, TOKENIZER, config())
    rng = random.Random(0)
    requests = [make_request(i, rng) for i in range(6)]
    outputs = run(engine, requests, [0, 1, 2, 3, 4, 5])
    assert engine.arena.keys[0].dtype == torch.bfloat16
    alone = {r.id: tokens_of(run(Engine(model, TOKENIZER, config()), [r])[r.id]) for r in requests}
    assert all(parts[-1].finish_reason in ("stop", "length") for parts in outputs.values())
    # Rounding may part two runs, but not from the start.
    assert all(tokens_of(outputs[name])[:1] == tokens[:1] for name, tokens in alone.items())


def test_a_request_is_admitted_when_its_tokens_fit_the_budget():
    """Two of 20 + 12 - 1 tokens do not fit in 60: the second waits for the first."""
    engine = Engine(MODEL, TOKENIZER, config(kv_tokens=60, max_step_tokens=64))
    requests = [GenerationRequest(str(i), [1, *range(4 + i, 23 + i)], [], SamplingParams(NEW)) for i in range(2)]
    for request in requests:
        engine.add(engine.start(request))
    first = engine.step()
    assert [output.request_id for output in first] == ["0"]
    assert engine.stats() | {"steps": 0} == engine.stats() | {
        "steps": 0,
        "running": 1,
        "waiting": 1,
        "kv_tokens_used": 31,
    }
    rest: list = []
    while engine.has_work:
        rest += engine.step()
    assert tokens_of([o for o in rest if o.request_id == "1"]) == offline(MODEL, requests[1])
    assert engine.stats()["kv_tokens_used"] == 0


def test_cancelling_frees_slot_and_cache_at_once():
    engine = Engine(MODEL, TOKENIZER, config(max_running=1, kv_tokens=80))
    rng = random.Random(3)
    running, waiting, after = (make_request(i, rng) for i in range(3))
    for request in (running, waiting, after):
        engine.add(engine.start(request))
    engine.step()
    assert engine.cancel("0") and engine.cancel("1") and not engine.cancel("0")
    assert (engine.stats()["running"], engine.stats()["waiting"], engine.stats()["kv_tokens_used"]) == (0, 1, 0)
    outputs: list = []
    while engine.has_work:
        outputs += engine.step()
    assert {output.request_id for output in outputs} == {"2"}
    assert tokens_of(outputs) == offline(MODEL, after)
    assert engine.stats()["cancelled"] == 2 and engine.stats()["finished"] == 1


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (GenerationRequest("x", []), "the prompt is empty"),
        (GenerationRequest("x", [1, 100_000]), "token id 100000 is outside the vocabulary"),
        (GenerationRequest("x", [1, -7]), "1 media placeholders for 0 media files"),
        (GenerationRequest("x", [1, -200]), "1 media placeholders for 0 media files"),
        (GenerationRequest("x", [1], [np.zeros((2, HIDDEN), np.float32)]), "0 media placeholders for 1 media files"),
        (GenerationRequest("x", [1, -200], [np.zeros((2, 7), np.float32)]), r"\(2, 7\); wanted \[M, 16\]"),
        (GenerationRequest("x", [1, -200], [np.zeros((0, HIDDEN), np.float32)]), "wanted"),
        (GenerationRequest("x", [1, -200], [np.zeros((2, HIDDEN), np.int64)]), "int64"),
        (GenerationRequest("x", [1, -200], [np.full((2, HIDDEN), np.nan, np.float32)]), "finite"),
        (GenerationRequest("x", [1, -200], ["array"]), "wanted"),
        (GenerationRequest("x", [1] * 96), "the prompt has 96 tokens, media included; the model takes at most 95"),
        (GenerationRequest("x", [1] * 90, [], SamplingParams(7)), "7 new tokens are asked for.*90.*6 fit"),
        (GenerationRequest("x", [1], [], SamplingParams(2), generated=(5, 6)), "nothing to go on with"),
        (GenerationRequest("x", [1], [], SamplingParams(9), generated=(5, 10**6)), "nothing to go on with"),
    ],
)
def test_what_the_forward_pass_relies_on_is_checked_first(request_, reason):
    engine = Engine(MODEL, TOKENIZER, config())
    with pytest.raises(RequestRefused, match=reason):
        engine.start(request_)


def test_a_request_larger_than_the_whole_cache_is_refused():
    engine = Engine(MODEL, TOKENIZER, config(kv_tokens=20))
    with pytest.raises(
        RequestRefused, match=r"need 26 tokens of KV cache; the budget is 20 \(serving.engine.kv_tokens\)"
    ):
        engine.start(GenerationRequest("x", [1] * 15, [], SamplingParams(12)))


def test_without_a_limit_an_answer_may_fill_the_context():
    engine = Engine(MODEL, TOKENIZER, config())
    assert engine.start(GenerationRequest("x", [1] * 90)).max_new_tokens == 6


def test_logits_that_are_not_finite_end_their_own_request_only():
    model = make_model()
    output = model.language.get_output_embeddings()
    output.weight = torch.nn.Parameter(output.weight.clone())
    with torch.no_grad():
        model.language.get_input_embeddings().weight[200] = float("nan")
    good = GenerationRequest("good", [1, 9, 10, 11], [], SamplingParams(NEW))
    bad = GenerationRequest("bad", [1, 9, 200, 11], [], SamplingParams(NEW))
    outputs = run(Engine(model, TOKENIZER, config(max_step_tokens=64)), [bad, good])
    assert outputs["bad"][-1].finish_reason == "error" and "finite" in outputs["bad"][-1].error
    assert tokens_of(outputs["good"]) == offline(model, good)


def test_stop_strings_end_an_answer():
    engine = Engine(MODEL, TOKENIZER, config())
    request = make_request(0, random.Random(2))
    plain = run(engine, [request])["0"]
    text = "".join(output.text for output in plain)
    assert len(text) > 3
    stop = text[2:4]
    stopped = run(engine, [replace(request, id="1", params=replace(request.params, stop=(stop,)))])["1"]
    assert "".join(output.text for output in stopped) == text[: text.index(stop)].strip()
    assert stopped[-1].finish_reason == "stop" and len(tokens_of(stopped)) < len(tokens_of(plain))


# Expert counts


def test_experts_are_counted_by_kind_layer_and_request():
    engine = Engine(MODEL, TOKENIZER, config())
    rng = random.Random(7)
    requests = [make_request(i, rng) for i in range(5)]
    outputs = run(engine, requests, [0, 1, 2, 3, 4])
    top_k, layers = 2, 2
    total = np.zeros_like(engine.expert_load)
    for request in requests:
        load = outputs[request.id][-1].expert_load
        files = iter(request.soft_tokens)
        expected = dict.fromkeys(KINDS, 0)
        kind_of = {placeholder: kind for kind, placeholder in PLACEHOLDER_IDS.items()}
        for token in request.ids:
            expected[kind_of.get(token, "text")] += len(next(files)) if token < 0 else 1
        expected["answer"] = len(tokens_of(outputs[request.id])) - 1  # the last one is never fed back
        for index, kind in enumerate(KINDS):
            assert load[index].sum(axis=-1).tolist() == [top_k * expected[kind]] * layers, kind
        total += load
    assert (total == engine.expert_load).all()


def test_the_counts_are_those_of_the_routers():
    engine = Engine(MODEL, TOKENIZER, config(max_step_tokens=64))
    request = GenerationRequest("0", [1, 9, 10, 11, 12], [], SamplingParams(1))
    load = run(engine, [request])["0"][-1].expert_load
    ids = torch.tensor([request.ids])
    MODEL(Batch(ids, torch.ones_like(ids, dtype=torch.bool), torch.full_like(ids, -100)))
    for layer, stats in enumerate(MODEL.recorder.layers):
        assert load[KINDS.index("text"), layer].tolist() == stats.tokens_per_expert.tolist()


def test_a_dense_model_has_no_expert_load():
    engine = Engine(make_model(sparse=False), TOKENIZER, config())
    assert run(engine, [make_request(0, random.Random(0))])["0"][-1].expert_load is None


# Sampling


def test_seeded_sampling_is_the_same_in_any_company():
    rng = random.Random(11)
    sampled = [make_request(i, rng, temperature=1.0, seed=100 + i, top_p=0.9) for i in range(6)]
    alone = {r.id: tokens_of(run(Engine(MODEL, TOKENIZER, config()), [r])[r.id]) for r in sampled}
    together = run(Engine(MODEL, TOKENIZER, config(max_step_tokens=7)), sampled, [0, 0, 1, 5, 9, 9])
    assert {name: tokens_of(outputs) for name, outputs in together.items()} == alone
    other = [replace(r, params=replace(r.params, seed=r.params.seed + 1)) for r in sampled]
    assert {r.id: tokens_of(run(Engine(MODEL, TOKENIZER, config()), [r])[r.id]) for r in other} != alone


def test_uniform_numbers_are_uniform():
    numbers = np.array([uniform(seed, position) for seed in range(40) for position in range(250)])
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 45  # chi-squared, 19 degrees of freedom: p about 0.001
    assert numbers.min() >= 0 and numbers.max() < 1


def frequencies(logits: list[float], n: int = 4000, **params) -> np.ndarray:
    rows = [Row(SamplingParams(**{"temperature": 1.0} | params), [], seed) for seed in range(n)]
    tokens = sample(torch.tensor([logits]).expand(n, -1), rows)
    return torch.bincount(tokens, minlength=len(logits)).numpy() / n


def test_sampling_follows_the_distribution():
    logits = torch.tensor([0.1, 2.0, -1.0, 1.0])
    np.testing.assert_allclose(frequencies(logits.tolist()), logits.softmax(0).numpy(), atol=0.03)
    warm = (logits / 2).softmax(0).numpy()
    np.testing.assert_allclose(frequencies(logits.tolist(), temperature=2.0), warm, atol=0.03)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 3]),
        ({"top_p": 0.6}, [1]),
        ({"top_p": 0.7}, [1, 3]),
        ({"top_p": 1e-9}, [1]),
    ],
)
def test_top_k_and_top_p_keep_the_likeliest(params, kept):
    logits = torch.tensor([0.1, 2.0, -1.0, 1.0])  # probabilities .10 .63 .03 .23
    expected = torch.full((4,), float("-inf"))
    expected[kept] = logits[kept]
    np.testing.assert_allclose(frequencies(logits.tolist(), **params), expected.softmax(0).numpy(), atol=0.03)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-50, 50), min_size=2, max_size=20), st.floats(0.01, 2), st.integers(0, 25), st.floats(1e-6, 1)
)
def test_a_sampled_token_is_always_one_of_those_kept(logits, temperature, top_k, top_p):
    row = Row(SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p), [], 0)
    token = int(sample(torch.tensor([logits]), [row])[0])
    scaled = torch.tensor(logits) / temperature  # in fp32, in which some are level
    better = int((scaled > scaled[token]).sum())
    assert better < (top_k or len(logits))


def test_rows_of_a_batch_have_their_own_parameters():
    logits = torch.tensor([[0.0, 3.0, 1.0]] * 3)
    rows = [
        Row(SamplingParams(), [], 0),
        Row(SamplingParams(frequency_penalty=2.0, presence_penalty=1.0), [1, 1], 0),
        Row(SamplingParams(temperature=1.0, top_k=1), [], 0),
    ]
    assert sample(logits, rows).tolist() == [1, 2, 1]
    assert logits.tolist() == [[0.0, 3.0, 1.0]] * 3


def test_penalties_count_what_was_generated():
    logits = torch.tensor([[1.0, 3.0]])
    once = Row(SamplingParams(presence_penalty=1.9), [1, 1, 1], 0)
    thrice = Row(SamplingParams(frequency_penalty=1.9), [1, 1, 1], 0)
    assert (sample(logits, [once]).item(), sample(logits, [thrice]).item()) == (1, 0)


def test_logprobs_are_those_of_the_model():
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([4, 7])
    for row, (chosen, alternatives) in enumerate(top_logprobs(logits, tokens, 3)):
        reference = logits[row].log_softmax(0)
        assert chosen == pytest.approx(reference[tokens[row]].item(), abs=1e-6)
        assert [token for token, _ in alternatives] == reference.topk(3).indices.tolist()


def test_logprobs_come_with_each_token():
    engine = Engine(MODEL, TOKENIZER, config())
    outputs = run(engine, [make_request(0, random.Random(4), logprobs=2), make_request(1, random.Random(4))])
    for output in outputs["0"][:-1]:
        (described,) = output.logprobs
        assert described.logprob == pytest.approx(described.top[0][1]) and len(described.top) == 2
        assert described.token == described.top[0][0]
    assert all(not output.logprobs for output in outputs["1"])


# Cache


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 9)), max_size=60))
def test_extents_never_overlap_and_nothing_is_lost(wishes):
    """(size, which of those held to give back first): random traffic."""
    arena = KVArena(1, 64, 1, 2, torch.float32)
    held: list[Extent] = []
    for size, back in wishes:
        if held and back < 4:
            arena.release(held.pop(back % len(held)))
        extent = arena.allocate(size)
        if extent is not None:
            held.append(extent)
        taken = [place for e in held for place in range(e.start, e.start + e.size)]
        assert len(taken) == len(set(taken)) and all(0 <= place < 64 for place in taken)
        assert arena.free_tokens == 64 - len(taken)
    for extent in held:
        arena.release(extent)
    assert arena.allocate(64) == Extent(0, 64)


# Soft tokens


def test_soft_tokens_of_files_in_one_batch_are_those_of_each_alone():
    rng = np.random.default_rng(0)

    def stored(kind: str, windows: int, lengths: list[int]) -> StoredFeatures:
        values = rng.normal(size=(windows, max(lengths), DIMS[kind])).astype(np.float16)
        for window, length in enumerate(lengths):
            values[window, length:] = 0
        return StoredFeatures(values, lengths)

    audio = [stored("audio", 3, [4, 4, 2]), stored("audio", 1, [5]), stored("audio", 2, [3, 3])]
    together = soft_tokens(MODEL.connectors["audio"], "audio", audio)
    assert [values.shape for values in together] == [(10, HIDDEN), (5, HIDDEN), (6, HIDDEN)]
    for file, values in zip(audio, together, strict=True):
        (alone,) = soft_tokens(MODEL.connectors["audio"], "audio", [file])
        np.testing.assert_allclose(values, alone, atol=1e-6)
    videos = [stored("video", 2, [4, 4]) for _ in range(3)]
    assert [v.shape for v in soft_tokens(MODEL.connectors["video"], "video", videos)] == [(1, HIDDEN)] * 3
