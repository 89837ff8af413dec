"""API keys with classes, their limits, and who goes first."""

from __future__ import annotations

import asyncio
import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from serve.calls import Started
from serve.keys import Buckets, Caller
from tests.serving.scripted import ANSWER, BROKEN, body_of, error_of, serving
from unimoe_ray.config.serving import KeyClassConfig, ServingConfig
from unimoe_ray.inference.request import Output

USAGE = 7 + 4  # of ANSWER
AT_ONCE = {"clock": lambda: 0.0}  # However long the requests take, no bucket fills up meanwhile.


def key(name: str, secret: str, key_class: str = "default") -> dict:
    return {"name": name, "sha256": hashlib.sha256(secret.encode()).hexdigest(), "key_class": key_class}


RIGHTS = {
    "keys": [key("alice", "sk-a", "gold"), key("bob", "sk-b", "few"), key("carol", "sk-c", "few"), key("dan", "sk-d")],
    "key_classes": {"gold": {"priority": 5}, "few": {"requests_per_minute": 2, "tokens_per_minute": 1000}},
}


def ask(site, secret: str, **rest):
    return site.post(body_of(**rest), headers={"Authorization": f"Bearer {secret}"})


def test_each_key_of_a_class_has_its_own_limit():
    with serving(rights=RIGHTS, **AT_ONCE) as site:
        assert [ask(site, "sk-b").status_code for _ in range(3)] == [200, 200, 429]
        refused = ask(site, "sk-b", stream=True)
        error = error_of(refused, 429)
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert refused.headers["retry-after"] == "30"
        assert [ask(site, "sk-c").status_code for _ in range(3)] == [200, 200, 429]
        assert [ask(site, secret).status_code for secret in ("sk-a", "sk-d") for _ in range(4)] == [200] * 8
        assert ask(site, "sk-e").status_code == 401
        assert site.get("/v1/models", headers={"Authorization": "Bearer sk-b"}).status_code == 200


def test_the_priority_of_a_class_goes_with_the_request():
    with serving(rights=RIGHTS) as site:
        for secret in ("sk-a", "sk-b", "sk-d"):
            assert ask(site, secret).status_code == 200
        assert [task.priority for task, _ in site.runner.tasks] == [5, 0, 0]


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_paid_for_after_the_answer(stream):
    rights = RIGHTS | {"key_classes": {"gold": {}, "few": {"tokens_per_minute": USAGE + 1}}}
    with serving(rights=rights, **AT_ONCE) as site:
        assert [ask(site, "sk-b", stream=stream).status_code for _ in range(3)] == [200, 200, 429]


def test_an_answer_that_breaks_off_is_paid_for():
    rights = RIGHTS | {"key_classes": {"gold": {}, "few": {"tokens_per_minute": 10}}}
    with serving(Started(7, (), ()), Output("r", "a ", (5, 6, 7)), BROKEN, rights=rights, **AT_ONCE) as site:
        assert [ask(site, "sk-b").status_code for _ in range(2)] == [503, 429]


def test_keys_of_the_file_have_the_class_default(tmp_path):
    path = tmp_path / "keys"
    path.write_text("sk-x\nsk-y\n")
    rights = RIGHTS | {"key_classes": RIGHTS["key_classes"] | {"default": {"requests_per_minute": 1, "priority": -1}}}
    with serving(keys=str(path), rights=rights, **AT_ONCE) as site:
        assert [ask(site, secret).status_code for secret in ("sk-x", "sk-y", "sk-d", "sk-x")] == [200, 200, 200, 429]
        assert ask(site, "sk-a").status_code == 200
        assert [task.priority for task, _ in site.runner.tasks] == [-1, -1, -1, 5]


def test_without_keys_nobody_is_asked_for_one():
    with serving(*ANSWER) as site:
        assert site.post(body_of()).status_code == 200


@pytest.mark.parametrize(
    ("rights", "told"),
    [
        ({"keys": [key("a", "1", "golden")], "key_classes": {"gold": {}}}, "'golden'; allowed: default, gold"),
        ({"keys": [key("a", "1"), key("a", "2")]}, "keys.1 \\(a\\): its name or sha256 is that of another"),
        ({"keys": [key("a", "1"), key("b", "1")]}, "keys.1 \\(b\\): its name or sha256 is that of another"),
        ({"keys": [{"name": "a", "sha256": "sk-in-the-clear"}]}, "keys.0.sha256"),
        ({"key_classes": {"few": {"requests_per_minute": 0}}}, "key_classes.few.requests_per_minute"),
    ],
)
def test_mistakes_are_named(rights, told):
    with pytest.raises(ValidationError, match=told):
        ServingConfig.model_validate(rights)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 100), st.lists(st.floats(0.0, 30.0), max_size=200))
def test_no_more_than_the_rate_and_who_waits_as_told_gets_in(per_minute, pauses):
    """Over any time, at most a minute's worth and what the rate gives; the wait that is told is enough."""
    now = [0.0]
    buckets, caller = Buckets(lambda: now[0]), Caller("a", KeyClassConfig(requests_per_minute=per_minute))
    taken = 0
    for pause in pauses:
        now[0] += pause
        wait = asyncio.run(buckets.take(caller))
        taken += not wait
        assert taken <= per_minute + now[0] * per_minute / 60 + 1e-6
    wait = asyncio.run(buckets.take(caller))
    now[0] += wait + 1e-6
    assert not wait or not asyncio.run(buckets.take(caller))


def test_an_overdrawn_bucket_is_paid_first():
    now = [0.0]
    buckets, caller = Buckets(lambda: now[0]), Caller("a", KeyClassConfig(tokens_per_minute=60))

    async def main() -> list[float]:
        first = await buckets.take(caller)
        await buckets.spend(caller, 160)
        second = await buckets.take(caller)
        now[0] += 101
        return [first, second, await buckets.take(caller)]

    assert asyncio.run(main()) == [0.0, 101.0, 0.0]
