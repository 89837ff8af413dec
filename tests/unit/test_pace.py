"""Who goes first when slots are taken, and who is sent away because it would take too long."""

from __future__ import annotations

import asyncio
import random
import threading
from contextlib import aclosing
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.unit.test_engine import MODEL, TOKENIZER, config, make_request, tokens_of
from unimoe_ray.inference import async_engine
from unimoe_ray.inference.async_engine import AsyncEngine
from unimoe_ray.inference.engine import Engine
from unimoe_ray.inference.pace import Pace
from unimoe_ray.inference.request import EngineOverloaded, Output


def test_the_wait_is_the_tokens_ahead_over_the_rate():
    pace = Pace()
    assert pace.wait([1000] * 100) == 0.0, "nothing is known"
    for _ in range(200):
        pace.stepped(tokens=16, seconds=0.1)
    for _ in range(100):
        pace.answered(40)
    assert pace.wait([1000] * 8) == pytest.approx(8 * 40 / 160)
    assert pace.wait([1000, 10]) == pytest.approx(50 / 160), "one can't generate more than it asked for"
    for _ in range(600):
        pace.stepped(tokens=8, seconds=0.1)
    assert pace.wait([1000] * 8) == pytest.approx(8 * 40 / 80, rel=0.02), "it is slower now"


def test_the_higher_priority_goes_first_then_the_older():
    engine = Engine(MODEL, TOKENIZER, config(max_running=1))
    rng = random.Random(3)
    for number, priority in enumerate([0, 0, 5, -1, 5, 0]):
        engine.add(engine.start(replace(make_request(number, rng, max_new_tokens=4), priority=priority)))
    ended = []
    while engine.has_work:
        ended += [output.request_id for output in engine.step() if output.finish_reason]
    assert ended == ["2", "4", "0", "1", "5", "3"]


def test_who_would_wait_too_long_is_sent_away_and_told_for_how_long(monkeypatch):
    """One slot, steps of 50 ms, answers of 10 tokens: everyone in front costs half a second. The clock is the steps'
    own, so that a busy machine is no slower."""
    bound, clock = 1.75, [1000.0]
    monkeypatch.setattr(
        async_engine, "time", SimpleNamespace(monotonic=lambda: clock[0], perf_counter=lambda: clock[0])
    )

    async def main() -> tuple[list, list[float]]:
        inner = Engine(MODEL, TOKENIZER, config(max_running=1))
        plain, asked, answered, begun = inner.step, {}, {}, threading.Event()

        def step() -> list[Output]:
            assert begun.wait(200)
            if inner.has_work:
                clock[0] += 0.05
            outputs = plain()
            for output in outputs:
                answered.setdefault(output.request_id, clock[0])
            return outputs

        monkeypatch.setattr(inner, "step", step)
        engine = AsyncEngine(inner, bound)
        rng = random.Random(1)

        async def ask(number: int, priority: int = 0) -> object:
            request = replace(make_request(number, rng, max_new_tokens=10), priority=priority)
            asked[request.id] = clock[0]
            try:
                async with aclosing(engine.generate(request)) as items:
                    return len(tokens_of([item async for item in items if isinstance(item, Output)]))
            except EngineOverloaded as error:
                return error

        # Known after this: how fast it is when one waits, and how long answers are.
        answers = asyncio.gather(*map(ask, range(4)))
        await asyncio.sleep(0)
        begun.set()
        await answers
        assert engine.wait_s() == 0.0, "a slot is free"
        crowd = [asyncio.create_task(ask(10 + number)) for number in range(10)]
        await asyncio.sleep(0)
        first = [asyncio.create_task(ask(30, priority=1))]
        results = await asyncio.gather(*crowd, *first)
        engine.close()
        return results, [answered[name] - asked[name] for name in answered if int(name) >= 10]

    results, waits = asyncio.run(main())
    shed = [result for result in results if isinstance(result, EngineOverloaded)]
    assert 6 <= len(shed) <= 8 and not isinstance(results[-1], EngineOverloaded), "who goes first waits for one only"
    assert all(result.wait_s > bound == result.max_wait_s for result in shed)
    assert len(waits) == len(results) - len(shed)
    assert max(waits) < 2 * bound, "those who stayed waited about as long as was thought"
