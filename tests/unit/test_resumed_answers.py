"""Answers that go on in another engine, and suspects on trial."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from tests.unit.test_engine import MODEL, TOKENIZER, config, make_request, offline, run, tokens_of
from unimoe_ray.inference.engine import Engine
from unimoe_ray.inference.request import GenerationRequest


def test_a_suspect_runs_alone_until_it_has_stood_its_trial():
    """The others pause meanwhile, and everybody's tokens are the usual ones."""
    engine = Engine(MODEL, TOKENIZER, config())
    rng = random.Random(5)
    requests = [replace(make_request(i, rng), trial=5 * (i in (1, 2))) for i in range(4)]
    for request in requests:
        engine.add(engine.start(request))
    steps, outputs = [], {request.id: [] for request in requests}
    while engine.has_work:
        before = {sequence.request.id: sequence.cached for sequence in engine.running}
        for output in engine.step():
            outputs[output.request_id].append(output)
        moved = {s.request.id for s in engine.running if s.cached > before.get(s.request.id, 0)}
        steps.append((moved, {name: len(tokens_of(made)) for name, made in outputs.items()}))
    on_trial = [(moved, made) for moved, made in steps if any(name in moved and made[name] <= 5 for name in "12")]
    assert len(on_trial) >= 10 and all(len(moved) == 1 for moved, _ in on_trial)
    assert any(len(moved) == 4 for moved, _ in steps)
    for request in requests:
        assert tokens_of(outputs[request.id]) == offline(MODEL, request)


def resumed(request: GenerationRequest, outputs: list, after: int) -> list:
    """The first outputs of an answer, and those of another engine, busy with others, that goes on from there."""
    rng = random.Random(after)
    others = [make_request(100 + i, rng) for i in range(3)]
    rest = replace(request, generated=tuple(tokens_of(outputs[:after])))
    return outputs[:after] + run(Engine(MODEL, TOKENIZER, config()), [*others, rest], [0, 0, 4, 2])[request.id]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 1.5, "seed": 7},
        {"temperature": 1.5, "seed": 8, "frequency_penalty": 1.0, "presence_penalty": 0.5, "logprobs": 2},
        {"max_new_tokens": None, "temperature": 2.0, "seed": 9},
    ],
)
def test_an_answer_goes_on_in_another_engine(params):
    """From any token on, with the same pieces of text (bytes that are no characters among them), log probabilities,
    reason to end and expert counts."""
    for number in range(3):
        request = make_request(number, random.Random(number), **params)
        whole = run(Engine(MODEL, TOKENIZER, config()), [request])[request.id]
        for after in sorted({0, 1, len(whole) // 2, len(whole) - 1}):
            outputs = resumed(request, whole, after)
            assert [(o.text, o.token_ids, o.finish_reason) for o in outputs] == [
                (o.text, o.token_ids, o.finish_reason) for o in whole
            ]
            np.testing.assert_array_equal(outputs[-1].expert_load, whole[-1].expert_load)
            for output, expected in zip(outputs, whole, strict=True):
                assert [t.token for t in output.logprobs] == [t.token for t in expected.logprobs]
                values = [[t.logprob for t in o.logprobs] for o in (output, expected)]
                np.testing.assert_allclose(*values, atol=1e-5)


def test_an_answer_goes_on_in_the_middle_of_a_stop_string():
    request = make_request(1, random.Random(1), max_new_tokens=40, temperature=1.0, seed=0)
    text = "".join(output.text for output in run(Engine(MODEL, TOKENIZER, config()), [request])[request.id])
    stop = next(text[i : i + 6] for i in range(8, len(text)) if "\ufffd" not in text[i : i + 6])
    request = replace(request, params=replace(request.params, stop=(stop,)))
    whole = run(Engine(MODEL, TOKENIZER, config()), [request])[request.id]
    assert whole[-1].finish_reason == "stop" and len(whole) < 40
    for after in range(len(whole)):
        outputs = resumed(request, whole, after)
        assert [(o.text, o.finish_reason) for o in outputs] == [(o.text, o.finish_reason) for o in whole]
