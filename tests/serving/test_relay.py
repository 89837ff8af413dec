"""The relay between handles that do as they are told: what it asks of the next replica when one dies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from ray.exceptions import WorkerCrashedError
from ray.serve.exceptions import BackPressureError

import serve.relay
from serve.calls import MediaFile, Started, Task, Told
from serve.errors import ApiError
from serve.metrics import IngressMetrics
from serve.relay import MAX_TRIES, MAX_VALUE_BYTES, MAX_VALUE_CHARACTERS, TRIAL_TOKENS, Relay
from unimoe_ray.inference.request import Output, RequestRefused, SamplingParams

ANSWER = 100
BUSY = (0, BackPressureError(num_queued_requests=1, max_queued_requests=1))


@dataclass
class Language:
    """Says "0 1 2 ..", from where the task says. fates: of each call in turn, the tokens after which its replica dies,
    or what it raises and after how many; after them, or where one is None, nothing happens. sizes: of the files, as
    it tells them; ways: by value or by reference, and what came so, of each call."""

    fates: list = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)
    cancelled: list[Task] = field(default_factory=list)
    sizes: tuple[int, ...] = ()
    ways: list[tuple[str, type]] = field(default_factory=list)
    by_reference: bool = True

    def options(self, **options) -> Language:
        return replace(self, by_reference=options.get("_by_reference", self.by_reference))

    @property
    def generate(self) -> Language:
        return self

    def remote(self, task: Task, *soft_tokens) -> Language.Call:
        self.tasks.append(task)
        self.ways.append(("reference" if self.by_reference else "value", *map(type, soft_tokens)))
        fate = self.fates.pop(0) if self.fates else None
        return Language.Call(self, task, self._say(task, fate), self.by_reference)

    async def _say(self, task: Task, fate) -> AsyncIterator[Told]:
        fate, error = fate if isinstance(fate, tuple) else (fate, WorkerCrashedError())
        begin = len(task.generated)
        for n in range(begin, ANSWER):
            await asyncio.sleep(0)
            if fate is not None and n - begin == fate:
                raise error
            output = Output(task.request_id, f"{n} ", (n,), finish_reason="length" if n == ANSWER - 1 else None)
            yield (Started(3, self.sizes, ()), output) if n == begin else (output,)
        if fate == ANSWER:
            raise error

    @dataclass
    class Call:
        language: Language
        task: Task
        items: AsyncIterator
        by_reference: bool

        def __aiter__(self) -> AsyncIterator:
            return self.items

        def cancel(self) -> None:
            self.language.cancelled.append(self.task)


@dataclass
class Encoder:
    """Gives soft tokens of a size. reads: how often somebody fetched them here."""

    nbytes: int
    reads: int = 0

    def options(self, **options) -> Encoder:
        return self

    @property
    def encode(self) -> Encoder:
        return self

    def remote(self, file: MediaFile) -> Encoder.Response:
        return Encoder.Response(self, np.zeros(self.nbytes, np.uint8))

    @dataclass(eq=False)
    class Response:
        encoder: Encoder
        values: np.ndarray

        def __await__(self) -> Iterator:
            self.encoder.reads += 1
            yield from asyncio.sleep(0).__await__()
            return self.values


def make_relay(language: Language, encoder: Encoder | None = None) -> Relay:
    encoders = {} if encoder is None else {"image": encoder}
    settings = {"fingerprint": "f", "cache_bytes": 10**9, "retry_after_s": 2}
    return Relay(encoders, language, metrics=IngressMetrics(), **settings)


def make_task(question: str = "what?", **params) -> Task:
    return Task(question, ((question, ""),), (), SamplingParams(**params))


async def heard(relay: Relay, task: Task, *files: MediaFile) -> list[Started | Output]:
    return await rest_of(relay.run(task, list(files)))


async def rest_of(items: AsyncIterator) -> list:
    return [item async for item in items]


def is_whole(items: list) -> bool:
    """One beginning, then every token once."""
    tokens = [token for item in items[1:] for token in item.token_ids]
    return items[0] == Started(3, (), ()) and tokens == list(range(ANSWER))


def test_another_replica_goes_on_from_the_tokens_so_far():
    language = Language([5, 20])
    assert is_whole(asyncio.run(heard(make_relay(language), make_task(temperature=1.0))))
    first, second, third = language.tasks
    assert first.generated == () and second.generated == (0, 1, 2, 3, 4) and third.generated == tuple(range(25))
    assert len({task.request_id for task in language.tasks}) == 3, "the lost replica may still have the first"
    seeds = {task.params.seed for task in language.tasks}
    assert len(seeds) == 1 and None not in seeds
    assert len(language.cancelled) == 2


def test_a_seed_that_is_given_is_used():
    language = Language()
    asyncio.run(heard(make_relay(language), make_task(seed=-5)))
    assert language.tasks[0].params.seed == -5 and not language.cancelled


def test_a_replica_that_dies_after_the_last_token_is_not_missed():
    language = Language([ANSWER])
    assert is_whole(asyncio.run(heard(make_relay(language), make_task()))) and len(language.tasks) == 1


def test_one_that_has_begun_waits_for_room_and_one_that_has_not_is_sent_away(monkeypatch):
    monkeypatch.setattr(serve.relay, "BUSY_WAIT_S", 0.0)
    begun = Language([5, *[BUSY] * (MAX_TRIES + 1)])
    assert is_whole(asyncio.run(heard(make_relay(begun), make_task())))
    lost = Language([0, *[BUSY] * (MAX_TRIES + 1)])  # Before it said anything.
    assert is_whole(asyncio.run(heard(make_relay(lost), make_task())))
    with pytest.raises(ApiError, match="too many requests are waiting") as error:
        asyncio.run(heard(make_relay(Language([BUSY])), make_task()))
    assert error.value.status == 429


@pytest.mark.parametrize("after", [0, 5])
def test_an_error_that_nobody_expects_ends_the_answer(after):
    language = Language([(after, ZeroDivisionError("of the replica"))])

    async def ask() -> list[Output]:
        answered = []
        with pytest.raises(ApiError, match=r"the model failed \(ZeroDivisionError\)") as error:
            async for item in make_relay(language).run(make_task(), []):
                answered.append(item)
        assert error.value.status == 500
        return answered[1:]

    assert len(asyncio.run(ask())) == after and len(language.tasks) == 1 and language.ways == [("value",)]


def test_a_task_that_is_refused_says_why():
    refused = Language([(0, RequestRefused("too long", "messages"))])
    with pytest.raises(ApiError, match="too long") as error:
        asyncio.run(heard(make_relay(refused), make_task()))
    assert error.value.status == 400 and error.value.param == "messages"


def test_each_trial_that_is_stood_in_vain_makes_the_next_one_longer():
    """The second replica dies right after the trial, so the request is not to blame."""
    language = Language([1, TRIAL_TOKENS])
    assert is_whole(asyncio.run(heard(make_relay(language), make_task())))
    assert [task.trial for task in language.tasks] == [0, TRIAL_TOKENS, 4 * TRIAL_TOKENS]


def test_who_crashes_a_replica_twice_alone_is_refused():
    language = Language([5, TRIAL_TOKENS - 1, TRIAL_TOKENS - 1])
    relay = make_relay(language)
    with pytest.raises(ApiError, match="has crashed the model twice, alone in it") as error:
        asyncio.run(heard(relay, make_task()))
    assert error.value.status == 400
    with pytest.raises(ApiError, match="has crashed the model twice"):
        asyncio.run(heard(relay, make_task()))
    assert [task.trial for task in language.tasks] == [0, TRIAL_TOKENS, 4 * TRIAL_TOKENS]


def test_a_replica_killed_during_an_innocent_trial_convicts_nobody():
    language = Language([5, TRIAL_TOKENS - 1])
    relay = make_relay(language)
    assert is_whole(asyncio.run(heard(relay, make_task())))
    language.fates = [5, TRIAL_TOKENS - 1]
    assert is_whole(asyncio.run(heard(relay, make_task()))), "its first trial is forgotten"


def test_replicas_that_keep_ending_end_the_answer_with_an_error(monkeypatch):
    monkeypatch.setattr(serve.relay, "TRIAL_TOKENS", 1)
    fates = [1, 1, 4, 16, 64]  # Each right after the trial, so that the request is not to blame.
    language = Language([*fates, 1])
    tokens = []

    async def listen() -> None:
        async for item in make_relay(language).run(make_task(), []):
            tokens.extend(item.token_ids if isinstance(item, Output) else ())

    with pytest.raises(ApiError, match="replicas keep ending") as error:
        asyncio.run(listen())
    assert (error.value.status, error.value.code, len(language.tasks)) == (503, "replica_lost", MAX_TRIES)
    assert tokens == list(range(sum(fates))), "what came before the end is right"


def test_suspects_are_tried_one_after_the_other_and_then_run_together():
    """A client that is slow to read does not hold up the others' trials."""
    language = Language([3, 3, 3])

    async def main() -> list[bool]:
        relay = make_relay(language)
        streams = [relay.run(make_task(f"question {n}"), []) for n in range(3)]
        begun = [[await anext(items) for _ in range(4)] for items in streams]
        begun[0].append(await anext(streams[0]))  # Its trial is over, and then nobody reads on for a while.
        others = await asyncio.gather(*map(rest_of, streams[1:]))
        rest = [await rest_of(streams[0]), *others]
        return [is_whole(first + last) for first, last in zip(begun, rest, strict=True)]

    assert asyncio.run(asyncio.wait_for(main(), 20)) == [True] * 3
    assert [task.trial for task in language.tasks] == [0] * 3 + [TRIAL_TOKENS] * 3


def test_what_is_small_and_known_to_be_so_travels_by_value():
    language = Language()
    for characters in (MAX_VALUE_CHARACTERS, MAX_VALUE_CHARACTERS + 1):
        assert is_whole(asyncio.run(heard(make_relay(language), make_task("?" * characters))))
    assert language.ways == [("value",), ("reference",)]

    async def ask(nbytes: int) -> tuple[list, list]:
        language, encoder = Language(sizes=(nbytes,)), Encoder(nbytes)
        relay, picture = make_relay(language, encoder), MediaFile("image", b"picture", "picture")
        reads = []
        for _ in range(3):
            await heard(relay, make_task(), picture)
            reads.append(encoder.reads)
        return language.ways, reads

    by_reference, by_value = ("reference", Encoder.Response), ("value", np.ndarray)
    assert asyncio.run(ask(MAX_VALUE_BYTES)) == ([by_reference, by_value, by_value], [1, 1, 1])
    assert asyncio.run(ask(MAX_VALUE_BYTES + 1)) == ([by_reference] * 3, [0, 0, 0])
