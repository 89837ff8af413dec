"""Secrets never reach what is printed."""

from __future__ import annotations

import base64

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from unimoe_ray.kuberay.redact import HIDDEN, LAST_APPLIED, Redactor


def secret(**values: str) -> dict:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "stringData": values}


@given(
    value=st.text(min_size=4, max_size=40).filter(lambda text: len(text.strip()) >= 4 and text.strip() not in HIDDEN),
    before=st.text(max_size=20),
    after=st.text(max_size=20),
)
def test_a_known_value_is_hidden_wherever_it_stands(value, before, after):
    redactor = Redactor()
    redactor.learn_document(secret(password=value))
    shown = redactor.text(before + value + after)
    assert value not in shown.replace(HIDDEN, "") and HIDDEN in shown
    encoded = base64.b64encode(value.encode()).decode()
    assert encoded not in redactor.text(f"data: {encoded}").replace(HIDDEN, "")


def test_a_document_shows_which_secrets_it_has_and_none_of_their_values():
    value = "s3cr3t-value"
    document = secret(user="me", password=value) | {"data": {"key": base64.b64encode(b"raw-key-bytes").decode()}}
    document["metadata"]["annotations"] = {LAST_APPLIED: f'{{"stringData":{{"password":"{value}"}}}}', "kept": "yes"}
    shown = yaml.safe_dump(Redactor().document(document))
    assert yaml.safe_load(shown)["stringData"] == {"user": HIDDEN, "password": HIDDEN}
    assert yaml.safe_load(shown)["data"] == {"key": HIDDEN}
    assert yaml.safe_load(shown)["metadata"]["annotations"] == {"kept": "yes"}
    assert document["stringData"]["password"] == value, "the document itself stays whole"


def test_environment_variables_that_are_named_like_secrets():
    plain = {"name": "NUM_CPUS", "value": "16"}
    reference = {"name": "REDIS_PASSWORD", "valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}}
    given = {"name": "WANDB_API_KEY", "value": "0123456789abcdef"}
    template = {
        "spec": {"containers": [{"name": "c", "env": [plain, reference, given], "args": ["--x=0123456789abcdef"]}]}
    }
    document = {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": "c"},
        "spec": {"template": template},
    }
    [container] = Redactor().document(document)["spec"]["template"]["spec"]["containers"]
    assert container["env"] == [plain, reference, {"name": "WANDB_API_KEY", "value": HIDDEN}]
    assert container["args"] == [f"--x={HIDDEN}"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Authorization: Bearer abcdefgh12345678", "Authorization: Bearer (hidden)"),
        ("redis://user:pa55word@redis:6379/0", "redis://(hidden)@redis:6379/0"),
        ("token hf_abcdefghijklmnopqrst in use", "token (hidden) in use"),
        ("aws AKIAIOSFODNN7EXAMPLE1", "aws (hidden)"),
        ("eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJrdWJl.c2lnbmF0dXJl", "(hidden)"),
        ("--redis-password=longenough --port=6379", "--redis-password=(hidden) --port=6379"),
        ('{"api_key": "abcdefghijkl"}', '{"api_key": "(hidden)"}'),
        ("-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY-----", "(hidden)"),
    ],
)
def test_what_looks_like_a_secret(text, shown):
    assert Redactor().text(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens: 512000000",
        "tokens_per_s=1234567890",
        "secretName: redis-password-of-ours",
        "password:\n  valueFrom: somewhere",
        "authOptions: {mode: token, secretName: unimoe-token}",
        "step 100: loss 1.25, 2048 tokens",
    ],
)
def test_what_only_resembles_one(text):
    assert Redactor().text(text) == text
