"""The client against an API server that fails as real ones do: one clear line, or another try, and never a secret."""

from __future__ import annotations

import socket
import time
from dataclasses import replace

import pytest
import yaml

from tests.kubernetes.core_api import CoreApi, running
from unimoe_ray.errors import UnimoeError, UsageError
from unimoe_ray.kuberay.client import Cluster, Patience, connect
from unimoe_ray.kuberay.documents import Ref
from unimoe_ray.kuberay.errors import ApiError, Expired, Unreachable

QUICK = Patience(attempts=3, connect_s=30.0, answer_s=30.0, first_pause_s=0.02, longest_pause_s=0.3)
SETTINGS = {
    "apiVersion": "v1",
    "kind": "ConfigMap",
    "metadata": {"name": "settings", "namespace": "default"},
    "data": {"a": "1"},
}
REF = Ref("v1", "ConfigMap", "default", "settings")


@pytest.fixture
def api():
    with running() as served:
        yield served


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def cluster(api: CoreApi, tmp_path, said) -> Cluster:
    return connect(api.kubeconfig(tmp_path / "kubeconfig"), say=said.append, patience=QUICK)


def raises_line(call, kind: type[UnimoeError] = ApiError) -> str:
    with pytest.raises(kind) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line and "Traceback" not in line
    return line


# Which cluster


def kubeconfig_of(url: str, tmp_path, **contexts: str):
    """contexts: name = namespace; the first is the current one."""
    names = list(contexts)
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": names[0],
        "clusters": [{"name": "c", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [
            {
                "name": name,
                "context": {"cluster": "c", "user": "u"} | ({"namespace": contexts[name]} if contexts[name] else {}),
            }
            for name in names
        ],
    }
    file = tmp_path / "kubeconfig"
    file.write_text(yaml.safe_dump(document))
    return file


def test_the_context_says_which_namespace_and_may_be_chosen(api, tmp_path, monkeypatch):
    file = kubeconfig_of(api.url, tmp_path, laptop="mine", cluster="ours", bare="")
    assert connect(file).namespace == "mine"
    assert connect(file, context="cluster").namespace == "ours"
    assert connect(file, context="bare").namespace == "default"
    assert connect(file, namespace="given").namespace == "given"
    monkeypatch.setenv("KUBECONFIG", str(file))
    assert connect(context="cluster").namespace == "ours"
    assert raises_line(lambda: connect(file, context="gone"), UsageError) == (
        f"--context gone: no such context in {file}; allowed: bare, cluster, laptop"
    )


def test_without_a_kubeconfig_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert (
        raises_line(connect, UsageError) == f"no kubeconfig at {tmp_path}/none: set KUBECONFIG or --kubeconfig to one"
    )
    (tmp_path / "none").write_text("{broken")
    assert raises_line(connect, UsageError).startswith(f"{tmp_path}/none: ")
    (tmp_path / "none").write_text("kind: Config\n")
    assert raises_line(connect, UsageError) == (
        f"{tmp_path}/none has no current context: name one with --context; allowed: (it has none)"
    )
    (tmp_path / "none").write_text("just text")
    assert raises_line(connect, UsageError).startswith(f"{tmp_path}/none")


def test_a_kubeconfig_without_a_current_context_needs_one_named(tmp_path, api):
    file = kubeconfig_of(api.url, tmp_path, one="first", two="second")
    document = yaml.safe_load(file.read_text())
    del document["current-context"]
    file.write_text(yaml.safe_dump(document))
    assert "has no current context: name one with --context; allowed: one, two" in raises_line(
        lambda: connect(file), UsageError
    )
    assert connect(file, context="two").get(REF) is None


def test_in_a_pod_the_service_account_is_used(tmp_path, monkeypatch, api):
    from kubernetes.config import incluster_config

    from unimoe_ray.kuberay import client

    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    assert "service account cannot be used" in raises_line(connect, UnimoeError)

    certificate = tmp_path / "ca.crt"
    certificate.write_text("one")
    for name, text in (("token", "a-pod-token"), ("namespace", "of-the-pod")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(certificate))
    monkeypatch.setattr(client, "SERVICE_ACCOUNT", tmp_path)
    # The package reads the certificate when it makes its pool, and this one is none.
    monkeypatch.setattr(client, "ApiClient", lambda settings: settings)
    found = connect()
    assert (found.namespace, found.api.host) == ("of-the-pod", "https://10.0.0.1:443")
    assert found.redactor.text("with a-pod-token") == "with (hidden)"
    assert "no kubeconfig" in raises_line(lambda: connect(context="x"), UsageError)


# Errors that stay


def test_credentials_that_are_not_accepted(tmp_path):
    with running(token="right-token") as api:
        good = connect(api.kubeconfig(tmp_path / "good"), patience=QUICK)
        assert good.get(REF) is None
        bad = connect(api.kubeconfig(tmp_path / "bad", token="wrong-token"), patience=QUICK)
        line = raises_line(lambda: bad.get(REF))
        assert "does not accept these credentials (401): log in again" in line and "wrong-token" not in line
        assert len([request for request in api.requests if "configmaps" in request]) == 1  # Not tried again.


def test_what_is_not_allowed_names_what_was_tried(api, cluster):
    reason = 'configmaps "settings" is forbidden: User "me" cannot patch resource "configmaps" in API group ""'
    api.fail("PATCH", "configmaps/settings", 403, reason, reason="Forbidden")
    line = raises_line(lambda: cluster.apply(SETTINGS))
    assert line == f"apply configmap/settings: not allowed (403): {reason}"


def test_what_is_not_there(cluster):
    assert cluster.get(REF) is None
    assert cluster.delete(REF) is False
    unknown = Ref("nobody.io/v1", "Thing", "default", "x")
    assert raises_line(lambda: cluster.get(unknown) or cluster.resource(unknown)).endswith(
        "does not know the kind Thing (nobody.io/v1)"
    )
    elsewhere = SETTINGS | {"metadata": {"name": "settings", "namespace": "nowhere"}}
    assert raises_line(lambda: cluster.apply(elsewhere)) == (
        'apply configmap/settings: namespaces "nowhere" not found (404)'
    )


def test_a_server_that_is_not_there_is_not_asked_again(tmp_path, said):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}"  # Nobody listens there.
        cluster = connect(kubeconfig_of(url, tmp_path, test=""), say=said.append, patience=QUICK)
        line = raises_line(lambda: cluster.get(REF), Unreachable)
    assert line.startswith("the API server of context 'test' (http://127.0.0.1:")
    assert line.endswith(" cannot be reached: Connection refused")
    assert said == []
    cluster = connect(kubeconfig_of("http://no.such.host.invalid:1", tmp_path, test=""), patience=QUICK)
    assert "cannot be reached" in raises_line(lambda: cluster.get(REF), Unreachable)


def test_a_server_with_a_certificate_of_someone_else(api_server, tmp_path, said):
    file = kubeconfig_of(api_server.url, tmp_path, test="")
    line = raises_line(lambda: connect(file, say=said.append, patience=QUICK).get(REF), Unreachable)
    assert "cannot be trusted" in line and "certificate verify failed" in line and said == []


# Errors that pass


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_server_that_is_busy_is_asked_again(api, cluster, said, status):
    cluster.resource(REF)
    api.fail("PATCH", "configmaps", status, "try later", times=2)
    assert cluster.apply(SETTINGS)["data"] == {"a": "1"}
    assert len(said) == 2 and said[0].startswith(f"apply configmap/settings: try later ({status}); again in 0.0")
    assert said[1].endswith("(3 of 3)")


def test_the_pause_is_what_the_server_asks_for_up_to_a_limit(api, cluster, said):
    cluster.resource(REF)
    api.fail("GET", "configmaps", 429, "slow down", Retry_After="1")
    started = time.monotonic()
    cluster.get(REF)
    assert time.monotonic() - started >= QUICK.longest_pause_s
    assert "again in 0.3 s" in said[0]


def test_it_gives_up_in_the_end(api, cluster, said):
    cluster.resource(REF)
    api.fail("GET", "configmaps", 503, "still starting", times=9)
    assert raises_line(lambda: cluster.get(REF)) == "read configmap/settings: still starting (503)"
    assert len(said) == 2


def test_an_answer_that_does_not_come(api, cluster, said):
    cluster.resource(REF)
    api.hang("GET", "configmaps", seconds=600)
    cluster.patience = replace(QUICK, answer_s=2.0)
    assert cluster.get(REF) is None
    assert (
        len(said) == 1 and "no full answer from the API server of context 'stub'" in said[0] and "timed out" in said[0]
    )
    api.drop("GET", "configmaps", times=9)
    assert "no full answer" in raises_line(lambda: cluster.get(REF), Unreachable)


def test_a_write_that_crossed_another_is_tried_again(api, cluster, said):
    cluster.resource(REF)
    api.fail("PATCH", "configmaps", 409, "the object has been modified", reason="Conflict")
    assert cluster.apply(SETTINGS)["data"] == {"a": "1"}
    assert len(said) == 1


def test_fields_of_another_manager_are_not_taken_unless_told(api, cluster, said):
    api.own(SETTINGS | {"data": {"a": "2", "b": "3"}}, "argocd")
    line = raises_line(lambda: cluster.apply(SETTINGS))
    assert line == 'apply configmap/settings: owned by "argocd": data.a; --force-conflicts takes them over'
    assert said == []
    assert cluster.apply(SETTINGS, force=True)["data"] == {"a": "1", "b": "3"}


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            'persistentvolumeclaims "runs" is forbidden: exceeded quota: small, requested: requests.storage=1Ti, '
            "used: requests.storage=10Gi, limited: requests.storage=100Gi",
            "the quota 'small' is exceeded: requests.storage 1Ti asked, 10Gi of 100Gi used; free some, "
            "ask for less, or raise the quota",
        ),
        (
            'admission webhook "policy.example" denied the request: images must come from registry.example',
            "the admission webhook 'policy.example' denied it: images must come from registry.example",
        ),
        (
            'pods "x" is forbidden: violates PodSecurity "restricted:latest": runAsNonRoot != true',
            "the namespace enforces pod security 'restricted:latest': runAsNonRoot != true",
        ),
        (
            "unable to create new content in namespace old because it is being terminated",
            "the namespace 'old' is being deleted: wait until it is gone, or use another",
        ),
        (
            'pods "x" is forbidden: maximum memory usage per Container is 1Gi, but limit is 4Gi',
            "a LimitRange of the namespace allows at most 1Gi of memory per Container",
        ),
        (
            'pods "x" is forbidden: failed quota: small: must specify limits.memory for: ray-head',
            "the quota 'small' of the namespace wants limits.memory stated for container ray-head",
        ),
        (
            "pods \"x\" is forbidden: ValidatingAdmissionPolicy 'gpus' with binding 'all' denied request: at most 8",
            "the admission policy 'gpus' denied it: at most 8",
        ),
    ],
)
def test_admission_in_words(api, cluster, message, words):
    cluster.resource(REF)
    api.fail("PATCH", "configmaps", 403, message, reason="Forbidden")
    assert raises_line(lambda: cluster.apply(SETTINGS)) == f"apply configmap/settings: {words}"


def test_a_webhook_that_is_down(api, cluster, said):
    cluster.resource(REF)
    message = (
        'Internal error occurred: failed calling webhook "v.kueue.io": failed to call webhook: Post '
        '"https://kueue.svc:443": dial tcp 10.0.0.7:443: connect: connection refused'
    )
    api.fail("PATCH", "configmaps", 500, message, times=9)
    line = raises_line(lambda: cluster.apply(SETTINGS))
    assert "the admission webhook 'v.kueue.io' did not answer" in line and "connection refused" in line
    assert "the service behind it must run" in line and len(said) == 2


# Lists and watches


def test_long_lists_are_read_to_the_end(api, cluster):
    for number in range(1203):
        api.put(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": f"p{number:04}", "labels": {"even": str(number % 2)}},
            }
        )
    pods = Ref("v1", "Pod", "default")
    found, _ = cluster.list_objects(pods)
    assert [pod["metadata"]["name"] for pod in found] == [f"p{number:04}" for number in range(1203)]
    assert found[0]["kind"] == "Pod"
    assert len(cluster.list_objects(pods, labels="even=0")[0]) == 602
    assert len([request for request in api.requests if "/pods?" in request]) == 3 + 2


def test_a_watch_tells_of_one_object_and_ends_in_time(api, cluster):
    _, version = cluster.list_objects(REF)
    cluster.apply(SETTINGS)
    cluster.apply(SETTINGS | {"metadata": {"name": "another", "namespace": "default"}})
    cluster.apply(SETTINGS | {"data": {"a": "2"}})
    cluster.delete(REF)
    started = time.monotonic()
    events = list(cluster.watch(REF, version, 1.0))
    assert time.monotonic() - started > 0.9 and "timeoutSeconds=1" in api.requests[-1].split("&")
    assert [(event.type, event.object["data"]) for event in events] == [
        ("ADDED", {"a": "1"}),
        ("MODIFIED", {"a": "2"}),
        ("DELETED", {"a": "2"}),
    ]


def test_a_watch_from_a_forgotten_version(api, cluster):
    _, version = cluster.list_objects(REF)
    api.forget()
    assert "too old resource version" in raises_line(lambda: list(cluster.watch(REF, version, 1.0)), Expired)


def test_a_watch_whose_connection_is_lost(api, cluster):
    _, version = cluster.list_objects(REF)
    cluster.apply(SETTINGS)
    api.cut_watch_after = 1
    events = []
    with pytest.raises(Unreachable, match="ended the connection"):
        for event in cluster.watch(REF, version, 5.0):
            events.append(event.type)
    assert events == ["ADDED"]


def test_what_was_applied_before_and_is_left_out_now_is_removed(cluster):
    cluster.apply(SETTINGS | {"data": {"a": "1", "b": "2"}})
    assert cluster.apply(SETTINGS)["data"] == {"a": "1"}
