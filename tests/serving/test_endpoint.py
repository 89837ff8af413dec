"""The running endpoint through the ``openai`` SDK: every modality, streamed and not, and what it says of itself."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import openai
import pytest
import requests
import yaml
from ray.serve.schema import ServeDeploySchema

from tests.serving.conftest import Endpoint
from tests.serving.media import image, input_audio, mp4, png, sound, text, video, wav
from tests.serving.test_faults import wait_for
from unimoe_ray.chat import Conversation
from unimoe_ray.data.schema import Media
from unimoe_ray.evaluation.evaluate import final_model
from unimoe_ray.inference.request import KINDS

NEW = 4  # what the run's own configuration generates offline


@pytest.fixture(scope="module")
def client(endpoint) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> list[dict]:
    """Sixteen questions of all modalities: what is sent, and the same as files for the offline chat."""
    folder = tmp_path_factory.mktemp("media")

    def file(name: str, data: bytes) -> str:
        (folder / name).write_bytes(data)
        return str(folder / name)

    questions = []
    for n in range(3):
        picture, noise, clip = png(n), wav(n, 0.5 + 0.4 * n), mp4(n)
        paths = [file(f"{n}.png", picture), file(f"{n}.wav", noise), file(f"{n}.mp4", clip)]
        questions += [
            {"parts": [image(picture), text(f"what is this? {n}")], "media": [("image", paths[0])]},
            {"parts": [sound(noise), text(f"what is this? {n}")], "media": [("audio", paths[1])]},
            {"parts": [input_audio(noise), text(f"what is this? {n}")], "media": [("speech", paths[1])]},
            {"parts": [video(clip), text(f"what is this? {n}")], "media": [("video", paths[2])]},
            {
                "parts": [image(picture), sound(noise, "speech"), video(clip), image(png(9)), text(f"a red {n}")],
                "media": [("image", paths[0]), ("speech", paths[1]), ("video", paths[2])]
                + [("image", file("9.png", png(9)))],
            },
        ]
    return [*questions, {"parts": [text("a circle")], "media": []}]


def offline(endpoint: Endpoint, question: dict) -> str:
    """What ``unimoe chat`` answers."""
    talk = Conversation(endpoint.config, final_model(endpoint.config))
    return talk.ask(question["parts"][-1]["text"], [Media(kind, (path,)) for kind, path in question["media"]])


def ask(client: openai.OpenAI, endpoint: Endpoint, parts: list[dict], **rest):
    messages = [{"role": "user", "content": parts}]
    return client.chat.completions.create(
        model=endpoint.model, messages=messages, **{"temperature": 0, "max_completion_tokens": NEW} | rest
    )


def streamed(client: openai.OpenAI, endpoint: Endpoint, parts: list[dict], **rest) -> tuple[str, list]:
    chunks = list(ask(client, endpoint, parts, stream=True, **rest))
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), chunks


def test_it_is_ready_within_a_minute(endpoint):
    assert endpoint.ready_s < 60
    assert requests.get(f"{endpoint.url}/health", timeout=30).json()["status"] == "ok"


def test_sixteen_mixed_requests_at_once_equal_the_offline_chat(endpoint, client, asked):
    """Streamed and not, token for token, in one batch with the others."""
    expected = [offline(endpoint, question) for question in asked]
    assert len(set(expected)) > 8, "the answers must differ for this to mean something"
    with ThreadPoolExecutor(16) as pool:
        streams = list(pool.map(lambda q: streamed(client, endpoint, q["parts"])[0], asked))
        whole = list(pool.map(lambda q: ask(client, endpoint, q["parts"]).choices[0].message.content, asked))
    assert streams == expected
    assert whole == expected


def test_a_streamed_answer_has_the_parts_that_the_sdk_expects(endpoint, client):
    parts = [image(png(3)), text("what?")]
    told, chunks = streamed(client, endpoint, parts, stream_options={"include_usage": True}, max_completion_tokens=9)
    reply = ask(client, endpoint, parts, max_completion_tokens=9)
    assert told == reply.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and len({chunk.id for chunk in chunks}) == 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == reply.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == reply.usage
    assert reply.usage.completion_tokens <= 9
    assert reply.usage.prompt_tokens > ask(client, endpoint, parts[1:]).usage.prompt_tokens


def test_several_turns_with_media_equal_the_offline_chat(endpoint, client, tmp_path):
    for name, data in (("a.png", png(1)), ("a.wav", wav(1))):
        (tmp_path / name).write_bytes(data)
    talk = Conversation(endpoint.config, final_model(endpoint.config))
    turns = [("what?", [("image", "a.png")]), ("and?", [("speech", "a.wav")]), ("more?", [])]
    messages: list[dict] = []
    for question, media in turns:
        expected = talk.ask(question, [Media(kind, (str(tmp_path / name),)) for kind, name in media])
        parts = [image(png(1)) if kind == "image" else sound(wav(1), "speech") for kind, _ in media]
        messages.append({"role": "user", "content": [*parts, text(question)]})
        reply = client.chat.completions.create(
            model=endpoint.model, messages=messages, temperature=0, max_completion_tokens=NEW
        )
        assert reply.choices[0].message.content == expected
        messages.append({"role": "assistant", "content": expected})


def test_a_sound_that_does_not_say_what_it_is_is_speech(endpoint, client):
    """The configuration's ``data.voice_as`` decides; sound and speech differ."""
    answers = {
        kind: ask(client, endpoint, [sound(wav(5), kind), text("what?")], max_completion_tokens=16)
        for kind in (None, "speech", "sound")
    }
    assert answers[None].choices[0].message.content == answers["speech"].choices[0].message.content
    assert answers[None].usage.prompt_tokens != answers["sound"].usage.prompt_tokens


def test_seeds_logprobs_and_stop_strings(endpoint, client):
    def sampled(seed: int) -> str:
        options = {"temperature": 1.5, "seed": seed, "max_completion_tokens": 24}
        return ask(client, endpoint, [text("what is this?")], **options).choices[0].message.content

    assert sampled(1) == sampled(1) != sampled(2)
    reply = ask(client, endpoint, [text("what is this?")], logprobs=True, top_logprobs=3)
    content = reply.choices[0].logprobs.content
    assert len(content) == reply.usage.completion_tokens
    for token in content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob, abs=1e-4)  # greedy


def test_which_experts_fired(endpoint, client):
    parts = [image(png(7)), sound(wav(7)), text("what?")]
    _, chunks = streamed(client, endpoint, parts, extra_body={"expert_load": True})
    told = chunks[-1].model_extra["expert_load"]
    whole = ask(client, endpoint, parts, extra_body={"expert_load": True}).model_extra["expert_load"]
    assert told == whole
    assert told["experts"] == endpoint.config.model.moe.slots
    assert list(told["load"]) == [kind for kind in KINDS if kind in ("text", "image", "audio", "answer")]
    soft_tokens = (
        ask(client, endpoint, parts).usage.prompt_tokens - ask(client, endpoint, parts[1:]).usage.prompt_tokens
    )
    assert {sum(layer) for layer in told["load"]["image"]} == {soft_tokens * endpoint.config.model.moe.top_k}


def test_errors_reach_the_sdk_as_its_own(endpoint, client):
    with pytest.raises(openai.NotFoundError, match="the model 'gpt-4' does not exist") as error:
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "x"}])
    assert error.value.code == "model_not_found" and error.value.request_id
    with pytest.raises(openai.BadRequestError, match="'tools' is not supported") as error:
        ask(client, endpoint, [text("x")], tools=[{"type": "function", "function": {"name": "f"}}])
    assert error.value.param == "tools"
    with pytest.raises(openai.BadRequestError, match="messages.0.content.0: not an image") as error:
        ask(client, endpoint, [image(b"no picture"), text("x")])
    assert error.value.code == "invalid_media"
    with pytest.raises(openai.BadRequestError, match="tokens, media included"):
        ask(client, endpoint, [text("plain words " * 400)])
    assert [model.id for model in client.models.list()] == [endpoint.model]


def encoded_files(endpoint: Endpoint, kind: str) -> float:
    return endpoint.metric("encoded_files_total", kind=kind)


def settled(read: Callable[[], tuple[float, ...]]) -> tuple[float, ...]:
    """Metrics that have not changed for longer than Ray takes to report them, in polls: when the machine stands still,
    they do not."""
    value, same = read(), 0
    while same < 10:
        time.sleep(0.5)
        before, value = value, read()
        same = same + 1 if value == before else 0
    return value


def test_a_repeated_image_runs_no_encoder(endpoint, client):
    """By metric. The same bytes as a video, or another image, do run one."""
    picture = png(1234)

    def counts() -> tuple[float, float]:
        return encoded_files(endpoint, "image"), endpoint.metric("embedding_cache_total", outcome="hit")

    files, hits = settled(counts)
    answers = {ask(client, endpoint, [image(picture), text("what?")]).choices[0].message.content for _ in range(5)}
    ask(client, endpoint, [text("and"), image(picture), image(png(1235))])
    wait_for(lambda: counts() >= (files + 2, hits + 5), 60)
    assert settled(counts) == (files + 2, hits + 5)
    assert len(answers) == 1


def test_metrics_of_every_deployment(endpoint, client):
    ask(client, endpoint, [image(png(77)), sound(wav(77)), sound(wav(77), "speech"), text("what?")])
    wanted = [("encoded_files_total", {"kind": kind}) for kind in ("image", "audio", "speech")] + [
        ("generated_tokens_total", {"deployment": "language"}),
        ("expert_tokens_total", {"kind": "image"}),
        ("requests_total", {"status": "200"}),
        ("ttft_seconds_count", {}),
        ("inter_token_seconds_count", {}),
        ("encoder_batch_files_count", {"deployment": "image"}),
    ]
    for name, labels in wanted:  # Each process reports its own, every two seconds.
        wait_for(lambda name=name, labels=labels: endpoint.metric(name, **labels) > 0, 60)


def test_one_request_id_through_all_logs(endpoint, client):
    reply = requests.post(
        f"{endpoint.url}/v1/chat/completions",
        headers={"X-Request-ID": "find-me-in-the-logs"},
        json={
            "model": endpoint.model,
            "messages": [{"role": "user", "content": [image(png(555)), text("what?")]}],
            "max_completion_tokens": 2,
        },
        timeout=60,
    )
    assert reply.headers["x-request-id"] == "find-me-in-the-logs"
    assert reply.json()["id"].startswith("chatcmpl-find-me-in-the-logs")
    for deployment in ("ingress", "image", "language"):
        # More than one replica where earlier requests took long.
        files = [file.path for replica in endpoint.replicas(deployment) for file in replica.open_files()]
        logs = [Path(path) for path in files if "/logs/serve/" in path]
        wait_for(lambda logs=logs: any("find-me-in-the-logs" in log.read_text() for log in logs), 60)


def test_what_carries_messages_gives_way_to_the_engine(endpoint, client):
    ask(client, endpoint, [text("what?")])  # The engine's thread starts with the first.

    def policies(deployment: str) -> list[int]:
        found = []
        for thread in [thread.id for replica in endpoint.replicas(deployment) for thread in replica.threads()]:
            with suppress(ProcessLookupError):  # It has ended since.
                found.append(os.sched_getscheduler(thread))
        return found

    wait_for(lambda: set(policies("ingress")) == {os.SCHED_BATCH}, 60)  # Another replica may just be starting.
    carriers, engines = (policies("language").count(policy) for policy in (os.SCHED_BATCH, os.SCHED_OTHER))
    assert 0 < engines < carriers


def test_the_serve_config_file(endpoint, tmp_path):
    """Valid for Serve's own schema, and builds the same application."""
    from serve.app import write_config

    settings = endpoint.config.model_copy(deep=True)
    settings.serving.engine.max_running = 3
    settings.serving.image.min_replicas = 0
    write_config(settings, tmp_path / "serve.yaml")
    schema = ServeDeploySchema.parse_obj(yaml.safe_load((tmp_path / "serve.yaml").read_text()))
    (app,) = schema.applications
    assert app.import_path == "serve.app:build" and app.args["serving"]["engine"] == {"max_running": 3}
    assert {d.name: d.autoscaling_config["min_replicas"] for d in app.deployments} == {
        "image": 0,
        "speech": 1,
        "audio": 1,
        "language": 1,
        "ingress": 1,
    }
    from serve.app import build

    assert build(json.loads(json.dumps(app.args))) is not None
