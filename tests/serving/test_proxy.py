"""The proxy's middleware, around small ASGI applications that behave as Serve's proxy does when an ingress dies."""

from __future__ import annotations

import asyncio
import json
import pickle
from contextlib import suppress
from dataclasses import replace

import pytest
from ray.serve._private.common import StreamingHTTPRequest
from ray.serve._private.http_util import ASGIReceiveProxy

from serve.ingress import expect_no_more
from serve.proxy import BODY, INLINE_WAIT_S, MAX_INLINE_BYTES, MAX_TRIES, SEED, SurviveIngress
from tests.serving.scripted import events_of, serving

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}

ONE_TWO = {"type": "http.request", "body": b"one two", "more_body": False}
ONE = {"type": "http.request", "body": b"one ", "more_body": True}
TWO = {"type": "http.request", "body": b"two", "more_body": False}
LEFT = {"type": "http.disconnect"}


def body(data: bytes, more: bool = False) -> dict:
    return {"type": "http.response.body", "body": data, "more_body": more}


def ask(app, *messages: dict, headers: tuple = ()) -> list[dict]:
    """Messages that the client gets for a request in two pieces (or the messages given)."""
    waiting, sent = iter(messages or (ONE, TWO)), []

    async def receive() -> dict:
        for message in waiting:
            return message
        await asyncio.Event().wait()

    async def send(message: dict) -> None:
        sent.append(message)

    asyncio.run(SurviveIngress(app)({"type": "http", "headers": headers}, receive, send))
    return sent


async def read_all(receive) -> bytes:
    data, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return data
        data, more = data + message["body"], message["more_body"]
    return data


def error_of(message: dict) -> dict:
    return json.loads(message["body"])["error"]


def test_an_ordinary_answer_passes_through():
    async def app(scope, receive, send):
        await send(START)
        await send(body(await read_all(receive), more=True))
        await send(body(b"end"))

    assert ask(app) == [START, body(b"one two", more=True), body(b"end")]


def test_a_request_without_any_answer_is_sent_again_whole():
    tries = []

    async def app(scope, receive, send):
        tries.append(await read_all(receive))
        if len(tries) == 2:
            await send(START)
            await send(body(b"answer"))

    assert ask(app) == [START, body(b"answer")]
    assert tries == [b"one two"] * 2


@pytest.mark.parametrize(
    ("messages", "length", "taken"),
    [
        ([ONE_TWO], b"7", b"one two"),
        ([{"type": "http.request", "body": b"one two"}], b"7", b"one two"),
        ([ONE, TWO], b"7", b"one two"),
        ([ONE_TWO], b"seven", None),
        ([ONE, TWO], b"%d" % (MAX_INLINE_BYTES + 1), None),
        ([LEFT], b"7", None),
        ([ONE, LEFT], b"7", None),
    ],
)
def test_a_small_body_that_is_there_goes_with_the_headers(messages, length, taken):
    """Then nothing is left to be read but that the client leaves; sent again, the request has it still."""
    seen, tries = [], []

    async def app(scope, receive, send):
        tries.append(scope.get(BODY))
        if taken is None:
            seen.append(await read_all(receive))
        else:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(receive(), 0.01)
        if len(tries) == 2:
            await send(START)
            await send(body(b"answer"))

    left = LEFT in messages
    assert ask(app, *messages, headers=((b"content-length", length),)) == ([] if left else [START, body(b"answer")])
    assert tries == [taken] * (1 if left else 2)
    assert seen == ([] if taken else [b"one " if ONE in messages else b""] if left else [b"one two"] * 2)


@pytest.mark.parametrize("inline", [False, True])
def test_the_ingress_asks_for_more_only_when_there_may_be_more(inline):
    """As a replica of Serve does when a request begins. Nothing of it is left when it ends."""
    asked = []

    async def more(metadata) -> bytes:
        asked.append(metadata)
        return pickle.dumps([{"type": "http.disconnect"}])

    async def main() -> None:
        scope = {"type": "http"} | ({BODY: b"whole"} if inline else {})
        request = StreamingHTTPRequest(scope, receive_asgi_messages=more)
        task = asyncio.create_task(
            ASGIReceiveProxy(scope, None, request.receive_asgi_messages).fetch_until_disconnect()
        )
        await asyncio.sleep(0.01)
        assert task.done() is not inline and asked == ([] if inline else [None])
        task.cancel()
        await asyncio.wait({task}, timeout=1)
        assert task.done()

    for _ in range(2):
        expect_no_more()
    asyncio.run(main())


@pytest.mark.parametrize("early", [(), (ONE,)])
def test_a_body_that_takes_its_time_is_the_apps_to_wait_for(early):
    """Also when Serve gives up waiting for it with the first try."""
    tries, arrived, waiting = [], asyncio.Event(), iter(early)

    async def app(scope, receive, send):
        tries.append(BODY in scope)
        if len(tries) == 1:
            assert [await receive() for _ in early] == list(early)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(receive(), 0.01)
            arrived.set()
            return
        await send(START)
        await send(body(await read_all(receive)))

    async def receive() -> dict:
        for message in waiting:
            return message
        await arrived.wait()
        return TWO

    async def main() -> list[dict]:
        sent: list[dict] = []

        async def send(message: dict) -> None:
            sent.append(message)

        scope = {"type": "http", "headers": [(b"content-length", b"7")]}
        await asyncio.wait_for(SurviveIngress(app)(scope, receive, send), 20 + INLINE_WAIT_S)
        return sent

    assert asyncio.run(main()) == [START, body(b"one two" if early else b"two")]
    assert tries == [False, False]


def test_a_request_that_never_gets_an_answer_is_a_503():
    tries = []

    async def app(scope, receive, send):
        tries.append(await read_all(receive))

    start, text = ask(app)
    assert len(tries) == MAX_TRIES
    assert start["status"] == 503 and (b"retry-after", b"2") in start["headers"]
    assert error_of(text)["type"] == "server_error"


def test_a_client_that_left_is_not_asked_for():
    tries = []

    async def app(scope, receive, send):
        tries.append(await read_all(receive))

    assert ask(app, {"type": "http.disconnect"}) == []
    assert len(tries) == 1


def chunk(content: str = "", name: str = "first", **choice) -> bytes:
    """An event of an answer called ``name``."""
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": None} | choice
    return f"data: {json.dumps({'id': name, 'created': len(name), 'choices': [choice]})}\n\n".encode()


END = chunk(delta={}, finish_reason="stop") + b"data: [DONE]\n\n"


def streams(*answers: list[bytes], seeds: list | None = None):
    """An app that says these events, try by try, and ends a stream only with its last event."""
    left = iter(answers)

    async def app(scope, receive, send):
        if seeds is not None:
            seeds.append(scope[SEED])
        await send(START)
        for events in (told := next(left)):
            await send(body(events, more=True))
        if told[-1].endswith(b"[DONE]\n\n"):
            await send(body(b""))

    return app


def test_a_stream_goes_on_where_it_was():
    """Whatever lies in one event the second time; as the answer that it began as, and drawn with the same seed."""
    seeds = []
    first = [chunk(delta={"role": "assistant", "content": ""}) + chunk("What "), chunk("ever ha")]
    second = [chunk(delta={"role": "assistant", "content": ""}, name="second") + chunk("Wh", "second")]
    second += [chunk("atever happ", "second") + chunk("en", "second"), END]
    sent = ask(streams(first, [part.replace(b"atever", b"at ever") for part in second], seeds=seeds))
    assert sent == [START, body(first[0], more=True), body(first[1], more=True), body(chunk("pp") + chunk("en"), True),
                    body(END, True), body(b"")]  # fmt: skip
    assert len(seeds) == 2 and seeds[0] == seeds[1]


def test_a_stream_goes_on_more_than_once():
    sent = ask(streams([chunk("a")], [chunk("ab")], [chunk("a"), chunk("bc"), END]))
    assert [message.get("body") for message in sent] == [None, chunk("a"), chunk("b"), chunk("c"), END, b""]


@pytest.mark.parametrize(
    "second",
    [
        [chunk("no")],  # another answer
        [chunk("y"), END],  # a shorter one
    ],
)
def test_a_stream_that_cannot_go_on_ends_with_an_error_event(second):
    *passed, last = ask(streams([chunk("yes")], second, [chunk("yes"), END]))
    assert passed == [START, body(chunk("yes"), more=True)]
    assert last["more_body"] is False and last["body"].startswith(b"data: ") and last["body"].endswith(b"\n\n")
    assert json.loads(last["body"][6:])["error"]["code"] == "replica_lost"


def test_a_stream_that_is_refused_the_second_time_ends_with_an_error_event():
    tries = []

    async def app(scope, receive, send):
        tries.append(1)
        if len(tries) == 1:
            await send(START)
            await send(body(chunk("yes"), more=True))
            return
        await send({"type": "http.response.start", "status": 429, "headers": [(b"content-type", b"application/json")]})
        await send(body(b"{}"))

    *passed, last = ask(app)
    assert passed == [START, body(chunk("yes"), more=True)] and len(tries) == 2
    assert json.loads(last["body"][6:])["error"]["code"] == "replica_lost"


def test_a_stream_that_breaks_off_each_time_ends_with_an_error_event():
    *passed, last = ask(streams(*[[chunk("yes")]] * MAX_TRIES))
    assert passed == [START, body(chunk("yes"), more=True)]
    assert json.loads(last["body"][6:])["error"]["code"] == "replica_lost"


@pytest.mark.parametrize("last", [b"data: [DONE]\n\n", b'data: {"error": {}}\n\n'])
def test_a_stream_cut_short_after_its_last_event_is_whole(last):
    async def app(scope, receive, send):
        await send(START)
        await send(body(chunk("yes") * last.endswith(b"DONE]\n\n") + last, more=True))

    assert ask(app)[1:] == [body(chunk("yes") * last.endswith(b"DONE]\n\n") + last, more=True), body(b"", more=False)]


def test_logprobs_that_are_known_are_not_told_again():
    def told(*tokens: str) -> bytes:
        return chunk("".join(tokens), logprobs={"content": [{"token": token} for token in tokens]})

    sent = ask(streams([told("a", "b")], [told("a"), told("b", "c"), told("d"), END]))
    assert [message.get("body") for message in sent[1:]] == [told("a", "b"), told("c"), told("d"), END, b""]


class Died(Exception):
    """Of no kind that anybody looks for."""


class DiesOnce:
    """An ingress whose first answer is cut after some messages."""

    def __init__(self, app, messages: int):
        self._app, self._left = app, messages

    async def __call__(self, scope, receive, send) -> None:
        dies = self._left > 0

        async def send_some(message: dict) -> None:
            self._left -= 1
            if dies and self._left < 0:
                raise Died
            await send(message)

        with suppress(Died):
            await self._app(scope, receive, send_some)


@pytest.mark.parametrize("messages", [1, 2, 3])
def test_over_http_the_stream_of_a_dying_ingress_is_a_whole_one(messages):
    """With logprobs and usage; what the model is asked the second time differs in its name alone."""
    with serving(around=lambda app: SurviveIngress(DiesOnce(app, messages))) as site:
        asked = {"stream": True, "logprobs": True, "stream_options": {"include_usage": True}}
        (*cut, done), (*whole, _) = (events_of(site.chat(**asked)) for _ in range(2))
    assert done == "[DONE]" and len({(event["id"], event["created"]) for event in cut}) == 1
    assert [event | {"id": "", "created": 0} for event in cut] == [event | {"id": "", "created": 0} for event in whole]
    first, second, other = (replace(task, request_id="") for task, _ in site.runner.tasks)
    assert first == second and first.params.seed is not None
    assert replace(other, params=first.params) == first and other.params.seed != first.params.seed


@pytest.mark.parametrize(("status", "retry"), [(404, False), (503, True), (429, True)])
def test_errors_in_plain_text_become_json(status, retry):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
        await send(body(b"Request dropped ", more=True))
        await send(body(b"due to backpressure"))

    start, text = ask(app)
    assert start["status"] == status and (b"content-type", b"application/json") in start["headers"]
    assert any(name == b"retry-after" for name, _ in start["headers"]) == retry
    assert error_of(text)["message"] == "Request dropped due to backpressure"


def test_a_large_request_is_not_kept(monkeypatch):
    monkeypatch.setattr("serve.proxy.MAX_KEPT_BYTES", 5)
    tries = []

    async def app(scope, receive, send):
        tries.append(await read_all(receive))

    start, _ = ask(app)
    assert tries == [b"one two"] and start["status"] == 503


def test_clients_do_not_steer_serve():
    seen = []

    async def app(scope, receive, send):
        seen.extend(scope["headers"])
        await send(START)
        await send(body(b""))

    given = [
        (b"x-request-id", b"a\xff"),
        (b"X-Request-Disconnect-Disabled", b"1"),
        (b"x_session_id", b"s"),
        (b"accept", b"*"),
    ]
    ask(app, headers=tuple(given))
    assert seen == [(b"x-request-id", "a\ufffd".encode()), (b"accept", b"*")]
