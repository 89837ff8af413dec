"""The HTTP side of the ingress over real HTTP, with a scripted model: answers, errors, limits, keys and routes."""

from __future__ import annotations

import json
import logging
import socket
import time

import pytest
import requests

from serve.calls import Started
from serve.errors import ApiError
from serve.http import UI
from serve.keys import ApiKeys
from serve.openai_api import ChatRequest
from tests.serving.media import image, input_audio
from tests.serving.scripted import (
    ANSWER,
    BROKEN,
    FOREVER,
    MODEL,
    STARTED,
    TICK_S,
    body_of,
    check_error,
    chunked,
    error_of,
    events_of,
    http_head,
    serving,
    tracebacks,
    wait_for,
)
from unimoe_ray.config.serving import ServingConfig
from unimoe_ray.errors import UnimoeError
from unimoe_ray.inference.request import Output

pytestmark = pytest.mark.usefixtures("no_traceback")

# Answers


def test_an_answer_in_one_piece(site):
    asked = int(time.time())
    answer = site.chat(user="me").json()
    assert asked <= answer.pop("created") <= time.time()
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer == {
        "object": "chat.completion",
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "a cat"},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11},
    }


def test_an_answer_in_events(site):
    """The role first, texts as they come, the reason why it ended, usage only if asked for, [DONE] at the end."""
    *chunks, done = events_of(site.chat(stream=True))
    assert done == "[DONE]"
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    assert {(chunk["object"], chunk["model"]) for chunk in chunks} == {("chat.completion.chunk", MODEL)}
    assert all(set(chunk) == {"id", "object", "created", "model", "choices"} for chunk in chunks)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [(choice["delta"], choice["finish_reason"]) for choice in choices] == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "a "}, None),
        ({"content": "cat"}, None),
        ({}, "stop"),
    ]
    assert all(choice["index"] == 0 and choice["logprobs"] is None for choice in choices)


def test_usage_comes_in_a_last_event_without_choices(site):
    *chunks, usage, done = events_of(site.chat(stream=True, stream_options={"include_usage": True}))
    assert (usage["choices"], done) == ([], "[DONE]")
    assert usage["usage"] == {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}
    assert not any("usage" in chunk for chunk in chunks)


def test_expert_load(site):
    """Only of the kinds that had tokens; in a stream with the last event."""
    load = {"experts": ["base", "image"], "load": {"text": [[3, 1]], "answer": [[0, 4]]}}
    assert site.chat(expert_load=True).json()["expert_load"] == load
    *chunks, last, _ = events_of(site.chat(expert_load=True, stream=True))
    assert (last["expert_load"], last["choices"]) == (load, [])
    assert not any("expert_load" in chunk for chunk in chunks) and "usage" not in last


def test_what_a_prompt_lost_is_said():
    note = "the first 2 turns left out: longer than the model can take"
    with serving(Started(7, (), (), note), *ANSWER[1:]) as site:
        assert site.chat().json()["prompt_shortened"] == note
        *_, last, _ = events_of(site.chat(stream=True))
        assert (last["prompt_shortened"], last["choices"]) == (note, [])


def test_a_dense_model_has_no_expert_load():
    dense = (Started(7, (), ()), Output("r", "cat", (5,), finish_reason="length"))
    with serving(*dense) as site:
        answer = site.chat(expert_load=True).json()
    assert answer["expert_load"] == {"experts": [], "load": {}}
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("streaming", [False, True])
def test_logprobs(site, streaming):
    """Of every token, its bytes too: a token may be half a character."""
    reply = site.chat(logprobs=True, top_logprobs=2, stream=streaming)
    choices = (
        [choice for chunk in events_of(reply)[:-1] for choice in chunk["choices"]]
        if streaming
        else reply.json()["choices"]
    )
    tokens = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]]
    first = {"token": "a ", "logprob": -0.5, "bytes": [97, 32]}
    half = {"token": "\ufffd", "logprob": -1.5, "bytes": [240, 159]}
    last = {"token": "cat", "logprob": -0.25, "bytes": [99, 97, 116]}
    assert tokens == [first | {"top_logprobs": [first, half]}, last | {"top_logprobs": []}]
    assert site.runner.tasks[-1][0].params.logprobs == 2


def test_an_empty_answer_is_an_answer():
    empty = (STARTED, Output("r", "", (2,), finish_reason="stop"))
    with serving(*empty) as site:
        assert site.chat().json()["choices"][0]["message"]["content"] == ""
        deltas = [chunk["choices"][0]["delta"] for chunk in events_of(site.chat(stream=True))[:-1]]
    assert deltas == [{"role": "assistant", "content": ""}, {}]


def test_times_and_statuses_are_counted():
    with serving(STARTED, 0.2, *ANSWER[1:]) as site:
        asked = time.monotonic()
        site.chat()
        answered = time.monotonic()
        site.chat("hi", n=2)
        assert site.statuses == [200, 400]
        (first,) = site.ttft.seen
        assert 0.19 <= first <= answered - asked
        assert len(site.inter_token.seen) == 3 and min(site.inter_token.seen) < 0.1


def test_the_official_client_reads_it(site):
    openai = pytest.importorskip("openai", reason="openai is not installed")
    client = openai.OpenAI(base_url=f"{site.url}/v1", api_key="x", max_retries=0)
    messages = [{"role": "user", "content": "hi"}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, logprobs=True, top_logprobs=2)
    assert (answer.choices[0].message.content, answer.usage.total_tokens) == ("a cat", 11)
    stream = client.chat.completions.create(model=MODEL, messages=messages, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "a cat"
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "unimoe_ray"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=messages)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="'tools' is not supported") as refused:
        client.chat.completions.create(model=MODEL, messages=messages, tools=[])
    assert refused.value.param == "tools"


# Errors while answering


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ApiError(400, "messages.0: no", "messages.0", "invalid_media"), "invalid_request_error"),
        (ApiError(413, "too large", "messages"), "invalid_request_error"),
        (ApiError(429, "too many requests are waiting", code="busy", retry_after=2), "rate_limit_error"),
        (ApiError(500, "the model failed"), "server_error"),
        (BROKEN, "server_error"),
        (ApiError(504, "no answer", code="timeout"), "server_error"),
    ],
    ids=lambda value: str(value.status) if isinstance(value, ApiError) else "",
)
def test_an_error_before_the_first_token_is_an_answer_of_its_status(error, kind, streaming):
    with serving(STARTED, error) as site:
        reply = site.chat(stream=streaming)
    said = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    assert error_of(reply, error.status) == said
    assert reply.headers.get("retry-after") == (None if error.retry_after is None else "2")
    assert site.statuses == [error.status]


def test_an_error_after_the_first_token_ends_the_stream_with_an_event():
    with serving(*ANSWER[:2], BROKEN) as site:
        *chunks, last = events_of(site.chat(stream=True))
        assert check_error(last) == {
            "message": BROKEN.message,
            "type": "server_error",
            "param": None,
            "code": "replica_lost",
        }
        assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == ["", "a "]
        assert site.statuses == [503]
        assert error_of(site.chat(), 503)["message"] == BROKEN.message


@pytest.mark.parametrize("streaming", [False, True])
def test_an_engine_that_gives_up_is_a_500(streaming):
    with serving(STARTED, Output("r", finish_reason="error", error="logits are not finite")) as site:
        error = error_of(site.chat(stream=streaming), 500)
    assert error["message"] == "the model failed: logits are not finite"


def test_an_engine_that_gives_up_in_a_stream_is_an_event():
    with serving(*ANSWER[:2], Output("r", finish_reason="error", error="out of memory")) as site:
        *_, last = events_of(site.chat(stream=True))
    assert check_error(last)["message"] == "the model failed: out of memory"


def test_a_mistake_of_ours_is_a_500_without_its_words(caplog):
    """Those, and the traceback, are for the log."""
    with serving(STARTED, ValueError("/secret/path.py")) as site:
        error = error_of(site.chat(), 500)
        assert error["message"] == "the server failed (ValueError)" and site.statuses == [500]
        assert site.get("/health").status_code == 200
    assert tracebacks(caplog.records) == [ValueError]
    caplog.clear()


def test_an_answer_that_takes_too_long_is_a_504():
    with serving(STARTED, FOREVER, request_seconds=1) as site:
        for streaming in (False, True):
            site.runner.closed.clear()
            began, before = time.monotonic(), site.runner.ticks
            error = error_of(site.chat(stream=streaming), 504)
            assert time.monotonic() - began >= 1 and (site.runner.ticks - before) * TICK_S < 2
            assert error["code"] == "timeout" and "no answer within 1 s" in error["message"]
            assert site.runner.closed.is_set()


def test_a_stream_that_takes_too_long_ends_with_an_event():
    with serving(*ANSWER[:2], FOREVER, request_seconds=1) as site:
        *chunks, last = events_of(site.chat(stream=True))
        assert check_error(last)["code"] == "timeout" and len(chunks) == 2
        assert site.runner.closed.is_set() and site.statuses == [504]


def test_many_short_steps_do_not_make_the_time_longer():
    """The time is for the whole answer, not for each token."""
    with serving(STARTED, *[TICK_S, Output("r", "a", (5,))] * 80, request_seconds=1) as site:
        error_of(site.chat(), 504)
        assert site.runner.ticks * TICK_S < 2


@pytest.mark.parametrize("after", [1, 2], ids=["before the first token", "in the middle"])
def test_a_client_that_leaves_a_stream_closes_its_run_within_a_second(after):
    with serving(*ANSWER[:2], FOREVER) if after == 2 else serving(STARTED, 0.3, *ANSWER[1:3], FOREVER) as site:
        body = json.dumps(body_of(stream=True)).encode()
        with socket.create_connection(("127.0.0.1", site.port)) as connection:
            connection.sendall(http_head(len(body)) + body)
            if after == 2:
                assert b"200 OK" in connection.recv(4096)
            wait_for(lambda: site.runner.tasks)
            assert not site.runner.closed.is_set()
            left = site.runner.ticks
        assert site.runner.closed.wait(60) and (site.runner.ticks - left) * TICK_S < 1.3


def test_a_client_that_leaves_in_the_middle_of_its_request():
    with serving() as site:
        with socket.create_connection(("127.0.0.1", site.port)) as connection:
            connection.sendall(http_head(100) + b'{"model":')
            time.sleep(0.1)
        wait_for(lambda: site.statuses)
        assert site.statuses == [400] and not site.runner.tasks


# Limits of the request


def test_a_body_over_the_limit_is_refused_before_it_is_read():
    with serving(max_body_mb=0.5) as site:
        status, body = site.raw(http_head(10**9))
        assert status == 413
        assert check_error(json.loads(body))["message"] == "the request is larger than 0.5 MB"
        assert error_of(site.post(b"x" * 500_001), 413)["code"] == "request_too_large"
        assert error_of(site.post(b"x" * 500_000), 400)["code"] == "invalid_json"


def test_a_body_over_the_limit_in_chunks_is_refused():
    body = json.dumps(body_of("x" * 1000)).encode()
    with serving(max_body_mb=0.01) as site:
        status, answer = site.raw(chunked(*[b"x" * 1000] * 11))
        assert status == 413 and check_error(json.loads(answer))["code"] == "request_too_large"
        assert site.raw(chunked(body[:500], body[500:]))[0] == 200
        assert site.statuses == [413, 200]


def test_a_body_that_does_not_come_is_a_408():
    with serving(request_seconds=0.3) as site:
        status, answer = site.raw(http_head(100) + b'{"model":')
        assert status == 408
        assert check_error(json.loads(answer))["message"] == "the request did not arrive within 0.3 s"


@pytest.mark.parametrize("length", [b"\xb2", b"-1", b"1e9", b"9" * 30])
def test_an_impossible_content_length_is_refused(site, length):
    assert site.raw(http_head(None, b"Content-Length: " + length) + b"{}")[0] == 400


def test_a_file_over_the_limit_is_refused():
    with serving(max_media_mb=0.001) as site:
        error = error_of(site.chat([image(bytes(1001))]), 413)
        assert error["param"] == "messages.0.content.0" and "larger than 0.001 MB" in error["message"]
        error_of(site.chat([input_audio(bytes(1001))]), 413)
        assert site.chat([image(bytes(1000))]).status_code == 200


# Keys


@pytest.fixture
def keys_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("\ufeffsk-one\n# sk-not\n\n  # sk-neither\n  sk-two  \nschlüssel\n", encoding="utf-8")
    return str(path)


def test_keys(keys_file):
    with serving(keys=keys_file) as site:

        def ask(authorization: bytes | None, path: str = "/v1/models") -> int:
            given = {} if authorization is None else {"Authorization": authorization}
            return site.get(path, headers=given).status_code

        for key in (b"sk-one", b"sk-two", "schlüssel".encode()):
            assert ask(b"Bearer " + key) == ask(b"bearer  " + key) == 200
        for wrong in (b"sk-not", b"sk-neither", b"# sk-not", b"sk-on", b"sk-one2", b"sk-one,sk-two", b"", b"\xff\xfe"):
            assert ask(b"Bearer " + wrong) == 401, wrong
        for wrong in (None, b"", b"Bearer", b"sk-one", b"Basic sk-one", b"Bearersk-one", b"Bearer schlussel"):
            assert ask(wrong) == 401, wrong


def test_what_keys_guard(keys_file):
    with serving(keys=keys_file) as site:
        for reply in (site.get("/v1/models"), site.get(f"/v1/models/{MODEL}"), site.chat()):
            error = error_of(reply, 401)
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
            assert reply.headers["www-authenticate"] == "Bearer"
            assert "sk-" not in reply.text
        assert not site.runner.tasks
        for path in ("/health", "/", "/ui/app.js", "/openapi.json", "/metrics"):
            assert site.get(path).status_code == 200
        assert site.post(body_of(), headers={"Authorization": "Bearer sk-two"}).status_code == 200


def test_a_wrong_key_is_refused_before_the_body_is_read(keys_file):
    with serving(keys=keys_file) as site:
        assert site.raw(http_head(1000))[0] == 401


@pytest.mark.parametrize("content", [None, b"", b"# one\n\n", b"\xff\xfe"])
def test_a_file_without_keys_is_an_error_not_an_open_door(tmp_path, content):
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnimoeError, match=f"serving.api_keys_file {path}: "):
        ApiKeys(ServingConfig(api_keys_file=str(path)))
    with pytest.raises(UnimoeError, match="serving.api_keys_file"):
        ApiKeys(ServingConfig(api_keys_file=str(tmp_path)))


# Routes


def test_models():
    began = int(time.time())
    with serving() as site:
        listed = site.get("/v1/models").json()
        (model,) = listed["data"]
        assert listed["object"] == "list"
        assert model == {"id": MODEL, "object": "model", "created": model["created"], "owned_by": "unimoe_ray"}
        assert began <= model["created"] <= time.time()
        assert site.get(f"/v1/models/{MODEL}").json() == model
        assert site.get(f"/v1/models/{MODEL.replace('/', '%2F')}").json() == model
        for other in ("other", "", "x" * 3000, "%00", "%ff", "..%2f..%2fetc"):
            error = error_of(site.get(f"/v1/models/{other}"), 404)
            assert (error["param"], error["code"]) == ("model", "model_not_found")
        reply = site.get("/v1/models/a%0d%0aSet-Cookie:x")
        assert error_of(reply, 404) and "set-cookie" not in reply.headers


def test_another_model_is_named(site):
    error = error_of(site.post(body_of() | {"model": "gpt\n" + "x" * 5000}), 404)
    assert (error["param"], error["code"], error["type"]) == ("model", "model_not_found", "not_found_error")
    assert error["message"].endswith(f"does not exist; there is '{MODEL}'")


def test_health():
    with serving() as site:
        assert site.get("/health").status_code == 200 and requests.head(site.url + "/health").status_code == 200
    with serving(unhealthy="the language model does not answer") as site:
        reply = site.get("/health")
        assert error_of(reply, 503)["message"] == "the language model does not answer"
        assert reply.headers["retry-after"] == "2"


def test_metrics_are_text(site):
    reply = site.get("/metrics")
    assert reply.text == "requests_total 1\n" and reply.headers["content-type"].startswith("text/plain; version=0.0.4")


@pytest.mark.parametrize("path", ["/", "/ui/app.js", "/ui/style.css"])
def test_the_page_and_its_files(site, path):
    kinds = {"/": "text/html", "/ui/app.js": "text/javascript", "/ui/style.css": "text/css"}
    reply = site.get(path)
    assert reply.content == (UI / (path.removeprefix("/ui/").removeprefix("/") or "index.html")).read_bytes()
    assert reply.headers["content-type"].split(";")[0] == kinds[path]
    assert "default-src 'self'" in reply.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in reply.headers["content-security-policy"]
    assert reply.headers["x-content-type-options"] == "nosniff" and reply.headers["cache-control"] == "no-cache"
    head = requests.head(site.url + path)
    assert head.status_code == 200 and not head.content and head.headers["content-length"] == str(len(reply.content))


@pytest.mark.parametrize(
    "path",
    [
        *("/ui/../http.py", "/ui/%2e%2e/http.py", "/ui/..%2fhttp.py", "/ui/%2e%2e%2fhttp.py", "/ui/..%5chttp.py"),
        *("/ui/x.py", "/ui/index.html", "/ui/", "/ui", "/ui/..", "/ui/.", "/ui/none.js", "/ui/app.js/", "/ui/APP.JS"),
        *(
            "/ui//etc/passwd",
            "/ui/%2fetc%2fpasswd",
            "/ui/a%00.js",
            "/ui/app.js%00",
            "/ui/%ff.js",
            f"/ui/{'a' * 5000}.js",
        ),
        *("/http.py", "/../http.py", "/%2e%2e/serve/http.py", "//etc/passwd", "/docs", "/redoc", "/v1", "/v1/chat"),
        *("/v1/chat/completions/", "/v1/completions", "/v1/embeddings", "/%ff", "/?\xff", "/health/"),
    ],
)
def test_nothing_else_is_there(site, path):
    """The path goes out as it is written: no client tidies it up."""
    request = f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    status, body = site.raw(request.encode("latin-1"))
    if path == "/?\xff":
        assert status in (200, 400)
        return
    assert status == 404 and check_error(json.loads(body))["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", {"POST"}),
        ("DELETE", "/v1/chat/completions", {"POST"}),
        ("OPTIONS", "/v1/chat/completions", {"POST"}),
        ("POST", "/v1/models", {"GET"}),
        ("PUT", "/", {"GET", "HEAD"}),
        ("TRACE", "/health", {"GET", "HEAD"}),
        ("PATCH", "/ui/app.js", {"GET", "HEAD"}),
    ],
)
def test_other_methods_are_refused_with_those_that_are_allowed(site, method, path, allowed):
    reply = requests.request(method, site.url + path, timeout=20)
    error = error_of(reply, 405)
    assert (error["type"], error["code"]) == ("invalid_request_error", "method_not_allowed")
    assert set(reply.headers["allow"].split(", ")) & allowed


@pytest.mark.parametrize("host", [b"[", b"a:b:c", b"\xff", b"a" * 5000, b"", b"evil.example/../"])
def test_any_host_header_will_do(site, host):
    request = b"GET /health HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n" % host
    assert site.raw(request)[0] == 200


def test_the_request_id_is_in_the_answers_id(site):
    reply = site.post(body_of(), headers={"X-Request-ID": "abc-123"})
    assert reply.json()["id"].startswith("chatcmpl-abc-123-")
    assert site.runner.tasks[-1][0].request_id == reply.json()["id"].removeprefix("chatcmpl-")
    *chunks, _ = events_of(site.post(body_of(stream=True), headers={"X-Request-ID": "abc-123"}))
    assert chunks[0]["id"].startswith("chatcmpl-abc-123-") and chunks[0]["id"] != reply.json()["id"]
    assert len(site.post(body_of(), headers={"X-Request-ID": b"\xff" * 3000}).json()["id"]) < 200


def test_every_answer_has_an_id_of_its_own(site):
    assert len({site.chat().json()["id"] for _ in range(5)}) == 5


def test_the_log_has_one_line_a_request_whatever_is_in_it(caplog):
    with caplog.at_level(logging.INFO, "ray.serve"), serving() as site:
        site.get("/v1/models/a%0Ab")
        site.post(body_of() | {"model": "a\nERROR b"})
        site.post(body_of() | {"a\nERROR b": 1})
        site.chat(user="a\nERROR b")
    lines = [record.getMessage() for record in caplog.records if record.name == "ray.serve"]
    assert len(lines) == 4 and not any("\n" in line for line in lines)
    assert [line.split()[2] for line in lines] == ["404", "404", "400", "200"]


def test_the_schema_says_what_a_request_may_hold(site):
    schema = site.get("/openapi.json").json()
    operation = schema["paths"]["/v1/chat/completions"]["post"]
    assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ChatRequest")
    assert set(schema["components"]["schemas"]["ChatRequest"]["properties"]) == set(ChatRequest.model_fields)
    assert set(operation["responses"]) >= {"200", "400", "401", "404", "408", "413", "429", "500", "503", "504"}
    assert not any(path.startswith("/ui") or path == "/" for path in schema["paths"])
