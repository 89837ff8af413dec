"""Guesses from what was said before: the same tokens, log probabilities and counts as without, in fewer steps."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.unit.test_engine import HIDDEN, MODEL, TOKENIZER, config, make_model, make_request, offline, run, tokens_of
from unimoe_ray.config.model import PLACEHOLDER_IDS
from unimoe_ray.inference.engine import Engine
from unimoe_ray.inference.lookup import propose
from unimoe_ray.inference.request import GenerationRequest, SamplingParams


def repeating_model():
    """Its answers go round in seven tokens: the last one decides what comes next, the layers hardly have a say."""
    model = make_model(seed=3)
    language = model.language
    with torch.no_grad():
        for name, parameter in language.model.layers.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.mul_(0.02)
        embedding, head = language.get_input_embeddings().weight, language.get_output_embeddings()
        before = [token - token % 7 + (token - 1) % 7 for token in range(len(embedding))]
        head.weight = torch.nn.Parameter(embedding[torch.tensor(before).clamp(max=len(embedding) - 1)].clone())
    return model


REPEATING = repeating_model()


def repeating_request(number: int, rng: random.Random, **params) -> GenerationRequest:
    """A prompt of text that comes twice around a picture."""
    words = [rng.randint(4, 250) for _ in range(rng.randint(3, 9))]
    soft = np.random.default_rng(number).normal(0, 0.5, (rng.randint(1, 5), HIDDEN)).astype(np.float32)
    ids = [1, *words, PLACEHOLDER_IDS["image"], *words, words[0]]
    return GenerationRequest(str(number), ids, [soft], SamplingParams(**{"max_new_tokens": 40} | params))


@pytest.mark.parametrize(
    ("context", "most", "expected"),
    [
        ([5, 6, 7, 8, 1, 5, 6, 7], 3, [8, 1, 5]),
        ([5, 6, 7, 8, 1, 5, 6, 7], 6, [8, 1, 5, 6, 7, 8]),  # goes on with what it has proposed itself
        ([9, 6, 7, 8, 1, 5, 6, 7], 2, [8, 1]),  # two words are enough
        ([6, 7, 1, 6, 7, 2, 6, 7], 1, [2]),  # the latest place
        ([5, 6, 7, 1, 6, 7, 2, 5, 6, 7], 1, [1]),  # three words say more than two
        ([3, 3, 3, 3], 4, [3, 3, 3, 3]),
        ([5, 6, 7, -9, -8, 5, 6, 7], 3, []),  # what follows is a picture
        ([5, 6, 7, 4, -8, 5, 6, 7], 3, [4]),
        ([-9, -8, -7, 4, -9, -8], 1, []),
        ([1, 2, 3, 4], 5, []),
        ([1, 2], 5, []),
        ([], 5, []),
        ([3, 3, 3, 3], 0, []),
    ],
)
def test_what_is_proposed(context, most, expected):
    assert propose(np.array(context, np.int64), most) == expected


@pytest.mark.parametrize("model", [MODEL, REPEATING], ids=["ordinary", "repeating"])
@pytest.mark.parametrize("max_step_tokens", [7, 64])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "seeded"])
def test_answers_are_those_without(model, max_step_tokens, sampled):
    """Tokens, texts, log probabilities to the bit, reasons and expert counts of a ragged batch that changes."""
    rng = random.Random(5)
    ways = [
        {},
        {"frequency_penalty": 0.7, "presence_penalty": 0.2},
        {"logprobs": 2},
        {"max_new_tokens": 2},
        {"max_new_tokens": 1},
        {"stop": ("e",)},
    ]
    how = {"temperature": 0.4, "top_p": 0.95} if sampled else {}
    requests = [
        make(i, rng, **(how | ways[i % len(ways)]), **({"seed": i} if sampled else {}))
        for i in range(12)
        for make in [(make_request, repeating_request)[i % 2]]
    ]
    joins = [rng.randint(0, 20) for _ in requests]
    plain = run(Engine(model, TOKENIZER, config(max_step_tokens=max_step_tokens)), requests, joins)
    engine = Engine(model, TOKENIZER, config(max_step_tokens=max_step_tokens, lookup_tokens=8))
    guessed = run(engine, requests, joins)
    for name, outputs in plain.items():
        assert tokens_of(guessed[name]) == tokens_of(outputs)
        assert "".join(o.text for o in guessed[name]) == "".join(o.text for o in outputs)
        assert [p for o in guessed[name] for p in o.logprobs] == [p for o in outputs for p in o.logprobs]
        assert guessed[name][-1].finish_reason == outputs[-1].finish_reason
        assert (guessed[name][-1].expert_load == outputs[-1].expert_load).all()
    stats = engine.stats()
    assert stats["drafted_tokens"] > 0 and stats["kv_tokens_used"] == 0
    if model is REPEATING:
        assert stats["drafted_tokens"] >= stats["accepted_tokens"] > 20


def test_an_answer_ends_inside_what_was_guessed_right():
    """At the end token, at a stop string and at the limit, with nothing of what was accepted after it."""
    first = repeating_request(13, random.Random(13))
    plain = run(Engine(REPEATING, TOKENIZER, config(max_step_tokens=64)), [first])["13"]
    tokens, text = tokens_of(plain), "".join(output.text for output in plain)
    assert len(tokens) == 40 and len(set(tokens)) == 7  # it goes round
    for stop in range(24, 32):
        ended = replace(first, params=replace(first.params, max_new_tokens=stop))
        engine = Engine(REPEATING, TOKENIZER, config(max_step_tokens=64, lookup_tokens=16))
        outputs = run(engine, [ended])["13"]
        assert tokens_of(outputs) == tokens[:stop] and len(outputs[-1].token_ids) >= 1
        # What is left in the cache is what a second request may go on from.
        again = run(engine, [replace(first, id="again", ids=[*first.ids, *tokens[: stop - 2]])])["again"]
        assert engine.stats()["reused_tokens"] == len(first.soft_tokens[0]) + len(first.ids) - 1 + stop - 3
        assert tokens_of(again)[: 42 - stop] == tokens[stop - 2 :]
    end = text[3:6]
    stopped = run(
        Engine(REPEATING, TOKENIZER, config(max_step_tokens=64, lookup_tokens=16)),
        [replace(first, params=replace(first.params, stop=(end,)))],
    )["13"]
    assert "".join(output.text for output in stopped) == text[: text.index(end)].strip()
    assert stopped[-1].finish_reason == "stop"


def test_the_end_token_ends_a_run_of_right_guesses():
    """The model says 2 (the end) where the prompt had it: what the guess has after that is dropped."""
    model = make_model()
    language = model.language
    with torch.no_grad():
        for name, parameter in language.model.layers.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()  # the next token depends on the last one alone
        after = torch.eye(HIDDEN)
        embed, head = language.get_input_embeddings(), language.get_output_embeddings()
        head.weight = torch.nn.Parameter(torch.zeros_like(embed.weight))
        embed.weight[4:10] = 4 * after[:6]
        for here, there in ((4, 5), (5, 6), (6, 7), (7, 2)):
            head.weight[there] = after[here - 4]
    request = GenerationRequest("0", [1, 9, 4, 5, 6, 7, 2, 9, 9, 4, 5], [], SamplingParams(20))
    engine = Engine(model, TOKENIZER, config(max_step_tokens=64, lookup_tokens=8))
    engine.add(engine.start(request))
    outputs: list = []
    while engine.has_work:
        for sequence in engine.running:
            sequence._guess = 8
        outputs += engine.step()
    assert tokens_of(outputs) == [6, 7, 2] == offline(model, request)
    assert outputs[-1].token_ids == (7, 2) and outputs[-1].finish_reason == "stop"


def test_right_guesses_get_longer():
    engine = Engine(REPEATING, TOKENIZER, config(max_step_tokens=64, lookup_tokens=16))
    outputs = run(engine, [repeating_request(13, random.Random(13), max_new_tokens=60)])["13"]
    lengths = [len(output.token_ids) for output in outputs]
    assert max(lengths) > 8 and sum(lengths) == 60 and len(lengths) < 20
    assert engine.stats()["steps"] == len(lengths)


def test_wrong_guesses_get_rarer():
    """Of a prompt in which every pair of words goes on otherwise than in the answer, 4 tokens are fed in vain."""
    model = repeating_model()
    with torch.no_grad():
        for name, parameter in model.language.model.layers.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        embedding = model.language.get_input_embeddings().weight
        model.language.get_output_embeddings().weight.copy_(torch.nn.functional.normalize(embedding).roll(1, 0))
    ids = [token for place in range(20) for token in (100 + place, 101 + place, 5)]
    request = GenerationRequest("0", [*ids, 99, 100], [], SamplingParams(20))
    engine = Engine(model, TOKENIZER, config(max_step_tokens=128, lookup_tokens=8))
    outputs = run(engine, [request])["0"]
    assert tokens_of(outputs) == list(range(101, 121)) == offline(model, request)
    assert engine.stats()["drafted_tokens"] == 4 and engine.stats()["accepted_tokens"] == 0


def test_logits_that_are_not_finite_end_the_request_after_the_tokens_before():
    model = repeating_model()
    plain = tokens_of(run(Engine(model, TOKENIZER, config()), [repeating_request(13, random.Random(13))])["13"])
    engine = Engine(model, TOKENIZER, config(max_step_tokens=64, lookup_tokens=8))
    decode, seen = engine.decoder, []

    def broken(embeddings, spans, ready):
        logits, chosen = decode(embeddings, spans, ready)
        if len(ready) > 3 and not seen:
            seen.append(len(ready))
            logits[2] = float("nan")  # after two tokens that are right
        return logits, chosen

    engine.decoder = broken
    outputs = run(engine, [repeating_request(13, random.Random(13))])["13"]
    assert outputs[-1].finish_reason == "error" and "finite" in outputs[-1].error
    assert tokens_of(outputs) == plain[: len(tokens_of(outputs))] and len(outputs[-1].token_ids) == 2
