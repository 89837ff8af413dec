"""The engine in a thread of its own, with many callers."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from types import SimpleNamespace

import pytest

from tests.unit.test_engine import MODEL, NEW, TOKENIZER, config, make_request, offline, tokens_of
from unimoe_ray.inference import async_engine
from unimoe_ray.inference.async_engine import OFTEN, AsyncEngine
from unimoe_ray.inference.engine import Engine
from unimoe_ray.inference.request import Admitted, EngineBusy, EngineStopped, GenerationRequest, Output

# The engine in its thread


def collect(request: GenerationRequest, engine: AsyncEngine):
    async def consume() -> list:
        return [item async for item in engine.generate(request)]

    return consume()


def test_many_callers_at_once():
    async def main() -> None:
        engine = AsyncEngine(Engine(MODEL, TOKENIZER, config()))
        rng = random.Random(9)
        requests = [make_request(i, rng) for i in range(12)]
        answers = await asyncio.gather(*(collect(request, engine) for request in requests))
        for request, (admitted, *outputs) in zip(requests, answers, strict=True):
            spliced = sum(map(len, request.soft_tokens)) + sum(token >= 0 for token in request.ids)
            assert admitted == Admitted(spliced, NEW, admitted.waits)
            assert tokens_of(outputs) == offline(MODEL, request)
        assert not answers[0][0].waits and answers[-1][0].waits
        engine.close()
        with pytest.raises(EngineStopped):
            engine.check()

    asyncio.run(main())


@pytest.mark.parametrize(("per_s", "fewest", "most"), [(1e9, NEW - 1, NEW), (1e-3, 1, 2)])
def test_tokens_of_a_stream_come_together(per_s, fewest, most):
    """The first text and the end at once, whatever lies between them as often as it may."""

    async def main() -> None:
        engine = AsyncEngine(Engine(MODEL, TOKENIZER, config(messages_per_s=per_s)))
        rng = random.Random(3)
        requests = [make_request(i, rng, max_new_tokens=NEW, logprobs=1) for i in range(4)]
        answers = await asyncio.gather(*(collect(request, engine) for request in requests))
        engine.close()
        for request, (_, *outputs) in zip(requests, answers, strict=True):
            assert tokens_of(outputs) == offline(MODEL, request)
            assert fewest <= len(outputs) <= most
            assert sum(len(output.logprobs) for output in outputs) == len(tokens_of(outputs))
            assert sum(bool(output.text) for output in outputs) <= most

    asyncio.run(main())


def test_the_first_text_comes_at_once_on_a_machine_that_was_started_just_now(monkeypatch):
    """The clock counts from there."""
    clock = SimpleNamespace(monotonic=lambda: 0.5, perf_counter=time.perf_counter)
    monkeypatch.setattr(async_engine, "time", clock)
    test_tokens_of_a_stream_come_together(1e-3, 1, 2)


def test_tokens_without_a_text_wait_for_the_one_that_has_it():
    """As those of a character that is several tokens do; for no longer than others wait."""
    thread = SimpleNamespace(engine=SimpleNamespace(config=config(messages_per_s=10)), _held={})

    def told(at: float, text: str, end: str | None = None) -> list[tuple]:
        due = AsyncEngine._due(thread, [Output("a", text, (round(at * 100),), finish_reason=end)], at)
        return [(output.text, output.token_ids) for output in due]

    assert told(0.00, "") == told(0.01, "") == []
    assert told(0.02, "é") == [("é", (0, 1, 2))]  # the first text, at once
    assert told(0.03, "b") == told(0.10, "c") == []
    assert told(0.13, "d") == [("bcd", (3, 10, 13))]
    assert told(0.14, "", "length") == [("", (14,))] and not thread._held
    assert told(0.00, "") == [] and told(0.11, "") == [("", (0, 11))]
    assert told(0.12, "e") == [("e", (12,))]


@pytest.mark.parametrize(("streams", "interval"), [(1, 0.1), (OFTEN, 0.1), (2 * OFTEN, 0.2), (100 * OFTEN, 0.25)])
def test_the_more_streams_the_fewer_messages_of_each(streams, interval):
    thread = SimpleNamespace(engine=SimpleNamespace(config=config(messages_per_s=10)), _held={})

    def told(at: float, end: str | None = None) -> int:
        return len(AsyncEngine._due(thread, [Output(f"{i}", "a", (1,), finish_reason=end) for i in range(streams)], at))

    assert told(0.0) == streams  # the first text, at once
    assert told(interval - 0.01) == 0 and told(interval + 0.01) == streams
    assert told(interval + 0.02, "stop") == streams


def test_a_caller_who_leaves_frees_the_slot(monkeypatch):
    """While the engine has more to say to him: it pauses after some tokens until he has left."""

    async def main() -> None:
        inner = Engine(MODEL, TOKENIZER, config(max_running=1, messages_per_s=1e9))
        plain, told, left = inner.step, [], threading.Event()

        def step() -> list:
            assert len(told) < 5 or left.wait(200)
            told.extend(outputs := plain())
            return outputs

        monkeypatch.setattr(inner, "step", step)
        engine = AsyncEngine(inner)
        leaving = make_request(0, random.Random(0), max_new_tokens=60, temperature=1.0, seed=1)
        items = engine.generate(leaving)
        for _ in range(3):
            await anext(items)
        await items.aclose()
        left.set()
        await asyncio.wait_for(collect(make_request(1, random.Random(1)), engine), 200)
        stats = engine.stats()
        assert (stats["cancelled"], stats["running"], stats["kv_tokens_used"]) == (1, 0, 0)
        engine.close()

    asyncio.run(main())


def test_too_many_are_sent_away():
    async def main() -> None:
        engine = AsyncEngine(Engine(MODEL, TOKENIZER, config(max_running=1, max_waiting=1)))
        rng = random.Random(0)
        first, second = (engine.generate(make_request(i, rng, max_new_tokens=60)) for i in range(2))
        await anext(first), await anext(second)
        with pytest.raises(EngineBusy, match="try again later"):
            await anext(engine.generate(make_request(2, rng)))
        await first.aclose()
        assert tokens_of([item async for item in second if not isinstance(item, Admitted)])
        engine.close()

    asyncio.run(main())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_callers_hear_of_an_engine_that_broke(monkeypatch):
    async def main() -> None:
        inner = Engine(MODEL, TOKENIZER, config())
        plain, told = inner.step, []

        def step() -> list:
            if len(told) > 3:
                raise MemoryError("no memory for the next step")
            told.extend(outputs := plain())
            return outputs

        monkeypatch.setattr(inner, "step", step)
        engine = AsyncEngine(inner)
        items = engine.generate(make_request(0, random.Random(0), max_new_tokens=60))
        with pytest.raises(EngineStopped, match="has stopped: MemoryError: no memory for the next step"):
            async for _ in items:
                pass
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                engine.check()
            except EngineStopped:
                return
            await asyncio.sleep(0.01)
        pytest.fail("the broken engine says that it runs")

    asyncio.run(main())
