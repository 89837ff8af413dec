"""Who goes first when slots are taken, and who is sent away because it would take too long."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import aclosing
from dataclasses import replace

import pytest

from tests.unit.test_engine import MODEL, TOKENIZER, config, make_request, run, tokens_of
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
    """One slot, steps of 50 ms, answers of 10 tokens: everyone in front costs half a second."""
    bound = 1.75

    async def main() -> tuple[list, list[float]]:
        inner = Engine(MODEL, TOKENIZER, config(max_running=1))
        run(inner, [make_request(100, random.Random(0), max_new_tokens=4)])  # What happens but once is over then.
        plain = inner.step

        def slow() -> list[Output]:
            time.sleep(0.05)
            return plain()

        monkeypatch.setattr(inner, "step", slow)
        engine = AsyncEngine(inner, bound)
        rng, waits = random.Random(1), []

        async def ask(number: int, priority: int = 0) -> object:
            request = replace(make_request(number, rng, max_new_tokens=10), priority=priority)
            asked = time.monotonic()
            outputs = []
            try:
                async with aclosing(engine.generate(request)) as items:
                    async for item in items:
                        if isinstance(item, Output):
                            if not outputs:
                                waits.append(time.monotonic() - asked)
                            outputs.append(item)
            except EngineOverloaded as error:
                return error
            return len(tokens_of(outputs))

        # Known after this: how fast it is when one waits, and how long answers are.
        await asyncio.gather(*map(ask, range(4)))
        assert engine.wait_s() == 0.0, "a slot is free"
        waits.clear()
        crowd = [asyncio.create_task(ask(10 + number)) for number in range(10)]
        await asyncio.sleep(0)
        first = [asyncio.create_task(ask(30, priority=1))]
        results = await asyncio.gather(*crowd, *first)
        engine.close()
        return results, waits

    results, waits = asyncio.run(main())
    shed = [result for result in results if isinstance(result, EngineOverloaded)]
    assert 6 <= len(shed) <= 8 and not isinstance(results[-1], EngineOverloaded), "who goes first waits for one only"
    assert all(result.wait_s > bound == result.max_wait_s for result in shed)
    assert max(waits) < 2 * bound, "those who stayed waited about as long as was thought"
