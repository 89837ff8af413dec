"""What a request may hold, over real HTTP with a scripted model: conversations, and mistakes named with their place."""

from __future__ import annotations

import io
import json
import time

import pytest

from serve.openai_api import KNOWN_ELSEWHERE, MAX_VALUES, ChatRequest
from tests.serving.media import data_url, image, input_audio, png, sound, text, video, wav
from tests.serving.scripted import MODEL, Site, body_of, chunked, error_of, serving

pytestmark = pytest.mark.usefixtures("no_traceback")

# Conversations


def user(content) -> dict:
    return {"role": "user", "content": content}


def assistant(content) -> dict:
    return {"role": "assistant", "content": content}


def system(content, role: str = "system") -> dict:
    return {"role": role, "content": content}


def turns_of(site: Site, *messages: dict) -> tuple[tuple[str, str], ...]:
    reply = site.post({"model": MODEL, "messages": list(messages)})
    assert reply.status_code == 200, reply.text
    return site.runner.tasks[-1][0].turns


@pytest.mark.parametrize(
    ("messages", "turns"),
    [
        ([user("hi")], (("hi", ""),)),
        ([system("be brief"), user("hi")], (("be brief\nhi", ""),)),
        ([system("be brief", "developer"), user("hi")], (("be brief\nhi", ""),)),
        ([user("a"), user("b")], (("a\nb", ""),)),
        ([user("a"), assistant("b"), user("c")], (("a", "b"), ("c", ""))),
        ([user("a"), assistant("b"), system("s"), user("c")], (("a", "b"), ("s\nc", ""))),
        ([user("a"), assistant("b"), assistant("c"), user("d")], (("a", "b\nc"), ("d", ""))),
        ([user("a"), assistant([text("b"), text("c")]), user("d")], (("a", "b\nc"), ("d", ""))),
        ([user([text("a"), text("b")])], (("a\nb", ""),)),
        ([system([text("a"), text("b")]), user("c")], (("a\nb\nc", ""),)),
        ([user("a"), assistant(""), user("c")], (("a", ""), ("c", ""))),
        ([user("a"), user(" ")], (("a\n ", ""),)),
        ([user("the <image> tag")], (("the < image> tag", ""),)),
        ([user("a"), assistant("an <audio>"), user("<speech>")], (("a", "an < audio>"), ("< speech>", ""))),
        ([user([text("<ima"), text("ge>")])], (("<ima\nge>", ""),)),
        ([user("</s><|assistant|>\0\u202e\U0001f642")], (("</s><|assistant|>\0\u202e\U0001f642", ""),)),
    ],
)
def test_messages_become_turns(site, messages, turns):
    assert turns_of(site, *messages) == turns


def test_media_keep_their_places():
    """Placeholders in the order of the parts, over all messages; files in the same order, named by their part."""
    picture, clip, tune, voice = png(1), b"a clip", wav(1), wav(2)
    with serving() as site:
        turns = turns_of(
            site,
            user([text("look"), image(picture), text("and <image> is text"), video(clip)]),
            assistant("yes"),
            user([sound(tune, "sound"), input_audio(voice, "speech"), sound(voice, None), text("what?")]),
        )
        task, files = site.runner.tasks[0]
    assert turns == (
        ("look\n<image>\nand < image> is text\n<video>", "yes"),
        ("<audio>\n<speech>\n<speech>\nwhat?", ""),
    )
    assert task.kinds == ("image", "video", "audio", "speech", "speech")
    assert [(file.kind, file.data) for file in files] == list(
        zip(task.kinds, (picture, clip, tune, voice, voice), strict=True)
    )
    assert [file.name for file in files] == [
        *("messages.0.content.1", "messages.0.content.3"),
        *("messages.2.content.0", "messages.2.content.1", "messages.2.content.2"),
    ]


def test_a_sound_that_does_not_say_its_kind_is_what_the_server_is_told():
    with serving(voice_as="audio") as site:
        turns_of(site, user([input_audio(b"x"), sound(b"x", None), sound(b"x", "speech"), text("?")]))
        assert site.runner.tasks[0][0].kinds == ("audio", "audio", "speech")


def test_files_alone_are_a_question(site):
    assert turns_of(site, user([image(b"x")])) == (("<image>", ""),)


@pytest.mark.parametrize(
    ("messages", "param", "message"),
    [
        ([assistant("a"), user("b")], "messages.0.content", "begins with an answer"),
        ([user("a"), assistant("b")], "messages.1.role", "the last message must be the user's"),
        ([user("a"), system("b")], "messages.1.role", "the last message must be the user's"),
        ([system("a")], "messages.0.role", "the last message must be the user's"),
        ([user("")], "messages.0.content", "nothing to answer"),
        ([user(" \n\t")], "messages.0.content", "nothing to answer"),
        ([user([text("")])], "messages.0.content", "nothing to answer"),
        ([system("be brief"), user("")], "messages.1.content", "nothing to answer"),
        ([user("a"), assistant("b"), user(" ")], "messages.2.content", "nothing to answer"),
        ([system([image(b"x")]), user("a")], "messages.0.content.0", "not to those of 'system'"),
        ([system([text("a"), sound(b"x")], "developer"), user("a")], "messages.0.content.1", "of 'developer'"),
        ([user("a"), assistant([text("a"), image(b"x")]), user("a")], "messages.1.content.1", "holds text only"),
        ([user("a")] * 129, "messages", "129 messages; at most 128"),
        ([user([image(b"x")] * 17)], "messages", "17 media files; at most 16"),
        ([user([image(b"x")] * 9), assistant("a"), user([sound(b"x")] * 8)], "messages", "17 media files"),
        ([user("x" * 600_000)] * 2, "messages", "1200001 characters of text; at most 1000000"),
        ([], "messages", "at least 1 item"),
        ([user([])], "messages.0.content", "at least 1 item"),
    ],
)
def test_conversations_that_cannot_be_answered(site, messages, param, message):
    asked = len(site.runner.tasks)
    error = error_of(site.post({"model": MODEL, "messages": messages}), 400)
    assert error["param"] == param and message in error["message"] and error["message"].startswith(param)
    assert error["code"] == "invalid_value" and len(site.runner.tasks) == asked


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "no scheme"),
        ("data:image/png;base64,", "the base64 data is empty"),
        ("data:image/png;base64,AAA", "not a multiple of 4"),
        ("data:image/png;base64,AA*A", "malformed base64"),
        ("data:image/png;base64,AAA\u00e9", "malformed base64"),
        ("data:image/png,abc", "not of the form"),
        ("https://127.0.0.1/a.png", "remote URLs are not allowed here"),
        ("file:///etc/passwd", "'file' URLs are not allowed"),
        ("gs://bucket/a.png", "'gs' URLs are not allowed"),
        ("/etc/passwd", "no scheme"),
    ],
)
def test_urls_that_are_not_accepted(site, url, message):
    parts = {"image_url": {"url": url}, "video_url": {"url": url}, "audio_url": {"url": url}}
    for kind, part in parts.items():
        error = error_of(site.chat([text("a"), {"type": kind, kind: part}]), 400)
        assert error["message"].startswith("messages.0.content.1: ") and message in error["message"]
        assert (error["param"], error["code"]) == ("messages.0.content.1", "invalid_media")


def test_sampling_parameters_reach_the_model():
    with serving() as site:
        site.chat(
            max_completion_tokens=9,
            max_tokens=9,
            temperature=0.5,
            top_p=0.9,
            top_k=3,
            seed=-5,
            stop=["a", "b"],
            frequency_penalty=-1,
            presence_penalty=2,
            response_format={"type": "text"},
            n=1,
        )
        site.chat(stop="a", max_tokens=3)
        first, second = (task.params for task, _ in site.runner.tasks)
    assert (first.max_new_tokens, first.temperature, first.top_p, first.top_k, first.seed) == (9, 0.5, 0.9, 3, -5)
    assert (first.stop, first.frequency_penalty, first.presence_penalty) == (("a", "b"), -1, 2)
    assert (second.stop, second.max_new_tokens, second.temperature, second.seed) == (("a",), 3, 1.0, None)
    assert first.logprobs is None


def test_null_is_as_good_as_nothing(site):
    optional = {name: None for name, field in ChatRequest.model_fields.items() if not field.is_required()}
    site.post(body_of() | optional)
    site.post({name: value for name, value in body_of().items() if name not in optional})
    first, second = (task.params for task, _ in site.runner.tasks[-2:])
    assert first == second and first.temperature == 1.0


# What is not supported, and mistakes


@pytest.mark.parametrize("name", sorted(KNOWN_ELSEWHERE))
def test_parameters_of_others_are_refused_by_name(site, name):
    for value in ("auto", [], {}, None):
        error = error_of(site.chat(**{name: value}), 400)
        assert error["message"] == f"'{name}' is not supported by this server"
        assert (error["param"], error["code"], error["type"]) == (
            name,
            "unsupported_parameter",
            "invalid_request_error",
        )


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"temprature": 1}, "temprature", "unknown parameter 'temprature'; did you mean 'temperature'?"),
        ({"max_token": 1}, "max_token", "did you mean 'max_tokens'?"),
        ({"qqqqqq": 1}, "qqqqqq", "unknown parameter 'qqqqqq'"),
        ({"": 1}, "", "unknown parameter ''"),
        ({"a.b": 1}, "a.b", "unknown parameter 'a.b'"),
        ({"x" * 5000: 1}, "x" * 200, "unknown parameter 'xxx"),
        ({"n": 2}, "n", "n: "),
        ({"n": 0}, "n", "n: "),
        ({"n": True}, "n", "n: "),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "Input should be 'text'"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.type", "'text'"),
        ({"response_format": "text"}, "response_format", "Input should be an object"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"stream": 1}, "stream", "valid boolean"),
        ({"stream_options": {"include_usage": True}}, None, "stream_options needs stream: true"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown parameter"),
        ({"top_logprobs": 3}, None, "top_logprobs needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"logprobs": 3}, "logprobs", "valid boolean"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, None, "max_tokens and max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_completion_tokens": -5}, "max_completion_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
        ({"max_tokens": "9"}, "max_tokens", "valid integer"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"model": None}, "model", "valid string"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_k": -1}, "top_k", "greater than or equal to 0"),
        ({"seed": 2**63}, "seed", "less than 9223372036854775808"),
        ({"seed": -(2**63) - 1}, "seed", "greater than or equal to"),
        ({"frequency_penalty": 3}, "frequency_penalty", "less than or equal to 2"),
        ({"presence_penalty": -3}, "presence_penalty", "greater than or equal to -2"),
        ({"stop": ["a"] * 5}, "stop", "at most 4 items"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": ["a", "b" * 257]}, "stop.1", "at most 256 characters"),
        ({"stop": ["a", 1]}, "stop.1", "valid string"),
        ({"stop": {"a": 1}}, "stop", "a string or a list of strings"),
        ({"user": "x" * 257}, "user", "at most 256 characters"),
        ({"expert_load": "yes"}, "expert_load", "valid boolean"),
        ({"model": 5}, "model", "valid string"),
        ({"model": None}, "model", "valid string"),
        ({"messages": None}, "messages", "valid array"),
        ({"messages": {"0": user("a")}}, "messages", "valid array"),
        ({"messages": "hi"}, "messages", "valid array"),
        ({"messages": [user("a"), "hi"]}, "messages.1", "should be an object"),
        ({"messages": [[]]}, "messages.0", "should be an object"),
        ({"messages": [{"content": "a"}]}, "messages.0.role", "is missing"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "is missing"),
        ({"messages": [user(None)]}, "messages.0.content", "a string or a list of parts"),
        ({"messages": [user({"type": "text", "text": "a"})]}, "messages.0.content", "a string or a list of parts"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role", "'user' or 'assistant'"),
        ({"messages": [user("a") | {"name": "b"}]}, "messages.0.name", "'name' is not supported"),
        ({"messages": [user("a") | {"user": "b"}]}, "messages.0.user", "unknown parameter 'messages.0.user'"),
        ({"messages": [user([text("a"), 5])]}, "messages.0.content.1", "should be an object"),
        ({"messages": [user([text(5)])]}, "messages.0.content.0.text", "valid string"),
        ({"messages": [user([{"type": "text"}])]}, "messages.0.content.0.text", "is missing"),
        ({"messages": [user([{"text": "a"}])]}, "messages.0.content.0", "'type'"),
        ({"messages": [user([{"type": "file", "file": {}}])]}, "messages.0.content.0", "'file'"),
        ({"messages": [user([{"type": "x" * 5000}])]}, "messages.0.content.0", "xxx"),
        ({"messages": [user([{"type": ["text"]}])]}, "messages.0.content.0", ""),
    ],
)
def test_mistakes_are_named_with_their_place(site, change, param, message):
    asked = len(site.runner.tasks)
    error = error_of(site.post(body_of() | change), 400)
    assert error["param"] == param and message in error["message"], error
    assert len(site.runner.tasks) == asked


@pytest.mark.parametrize(
    ("part", "place", "message"),
    [
        ({"type": "image_url", "image_url": {"url": 5}}, "image_url.url", "valid string"),
        ({"type": "image_url", "image_url": {}}, "image_url.url", "is missing"),
        ({"type": "image_url", "image_url": "data:,"}, "image_url", "should be an object"),
        ({"type": "image_url"}, "image_url", "is missing"),
        ({"type": "image_url", "image_url": {"url": "a", "detail": "high"}}, "image_url.detail", "'auto'"),
        ({"type": "image_url", "image_url": {"url": "a", "uuid": 1}}, "image_url.uuid", "unknown parameter"),
        ({"type": "video_url", "video_url": {"url": None}}, "video_url.url", "valid string"),
        ({"type": "audio_url", "audio_url": {"url": "a", "kind": "music"}}, "audio_url.kind", "'speech' or 'sound'"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA"}}, "input_audio.format", "is missing"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "exe"}}, "input_audio.format", "'wav'"),
        ({"type": "input_audio", "input_audio": {"data": [1], "format": "wav"}}, "input_audio.data", "valid string"),
    ],
)
def test_mistakes_in_parts_are_named_with_their_place(site, part, place, message):
    error = error_of(site.chat([text("a"), part]), 400)
    assert error["param"] == f"messages.0.content.1.{place}" and message in error["message"]


def with_rest(rest: bytes) -> bytes:
    return json.dumps(body_of()).encode()[:-1] + b"," + rest + b"}"


NO_JSON = {
    "empty": b"",
    "blank": b" \n",
    "NUL": b"\0",
    "text": b"hello",
    "cut off": json.dumps(body_of()).encode()[:-1],
    "something after it": json.dumps(body_of()).encode() + b"{}",
    "a comment": b"/* hi */" + json.dumps(body_of()).encode(),
    "a form": b"model=tiny&messages=hi",
    "multipart": b"--a\r\nContent-Disposition: form-data\r\n\r\nhi\r\n--a--",
    "gzip": b"\x1f\x8b\x08\x00\x00",
    "UTF-16": json.dumps(body_of()).encode("utf-16"),
    "UTF-8 with its mark": b"\xef\xbb\xbf" + json.dumps(body_of()).encode(),
    "invalid UTF-8": with_rest(b'"user":"\xff"'),
    "an overlong character": with_rest(b'"user":"\xc0\x80"'),
    "a surrogate in UTF-8": with_rest(b'"user":"\xed\xa0\x80"'),
    "a lone surrogate": with_rest(rb'"user":"\ud800"'),
    "a lone surrogate as a name": with_rest(rb'"\udc00":1'),
    "a lone surrogate in a message": rb'{"model":"a","messages":[{"role":"user","content":"\ud83d"}]}',
    "a control character": with_rest(b'"user":"\0"'),
    "single quotes": b"{'model': 'a'}",
    "a name twice, unquoted": b"{a:1,a:2}",
    "100,000 lists": b"[" * 100_000,
    "100,000 lists, closed": b"[" * 100_000 + b"]" * 100_000,
    "50,000 lists in a parameter": with_rest(b'"user":' + b"[" * 50_000 + b"]" * 50_000),
    "50,000 objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "100,000 objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a number of 5,000 digits": with_rest(b'"seed":' + b"9" * 5000),
    "a number of 5,000 digits in an unknown parameter": with_rest(b'"tools":' + b"9" * 5000),
    "very many small values": b'{"model":"a","messages":[' + b"0," * MAX_VALUES + b"0]}",
}


@pytest.mark.parametrize("body", NO_JSON.values(), ids=NO_JSON)
def test_a_body_that_is_no_json(site, body):
    assert error_of(site.post(body), 400)["code"] == "invalid_json"


@pytest.mark.parametrize("body", [b"[]", b"null", b"1", b'"a"', b"true", b"[{}]"])
def test_a_body_that_is_no_object(site, body):
    assert "should be an object" in error_of(site.post(body), 400)["message"]


@pytest.mark.parametrize(
    ("rest", "param"),
    [
        (b'"temperature":NaN', "temperature"),
        (b'"temperature":Infinity', "temperature"),
        (b'"top_p":-Infinity', "top_p"),
        (b'"temperature":1e999', "temperature"),
        (b'"temperature":' + b"9" * 400, "temperature"),
        (b'"seed":' + b"9" * 4300, "seed"),
        (b'"seed":1e400', "seed"),
        (b'"max_tokens":1e3', "max_tokens"),
        (b'"temperature":1,"temperature":3', "temperature"),
        (b'"messages":[]', "messages"),
        (b'"messages":[{"role":"user","content":"a"},{}]', "messages.1.role"),
        (b'"tools":NaN', "tools"),
        (b'"tools":' + b"[" * 150 + b"]" * 150, "tools"),
    ],
)
def test_odd_values(site, rest, param):
    """A name that is given twice means its last value."""
    assert error_of(site.post(with_rest(rest)), 400)["param"] == param


def test_of_a_name_given_twice_the_last_value_counts(site):
    assert site.post(with_rest(b'"temperature":3,"temperature":0.5')).status_code == 200
    assert site.runner.tasks[-1][0].params.temperature == 0.5


def test_many_mistakes_cost_little(site):
    """The largest number of values that is allowed, all of them wrong."""
    body = b'{"model":"a","messages":[' + b",".join([b"0"] * (MAX_VALUES - 10)) + b"]}"
    began = time.process_time()  # the server's too
    assert error_of(site.post(body), 400)["param"] == "messages.0"
    assert time.process_time() - began < 5


def test_the_kind_of_content_is_not_asked_for(site):
    """Clients forget it; what is no JSON is refused anyway."""
    for kind in ("application/json", "text/plain", "application/x-www-form-urlencoded", "\xff"):
        assert site.post(body_of(), headers={"Content-Type": kind.encode("latin-1")}).status_code == 200
    assert site.raw(chunked(io.BytesIO(json.dumps(body_of()).encode()).read()))[0] == 200


def test_long_urls_are_no_problem(site):
    """Of a file that is there, whatever is said before its content."""
    assert site.chat([{"type": "image_url", "image_url": {"url": data_url(bytes(3 * 10**6))}}]).status_code == 200
