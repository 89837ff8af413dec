"""Apply: checked by us and by a real API server before anything is written, told line by line, without secrets."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml
from kubernetes import client

from tests.kubernetes.core_api import KUEUE, PROMETHEUS, CoreApi
from tests.kubernetes.ray_documents import play_status, ray_cluster, ray_job, ray_service
from unimoe_ray.errors import UsageError
from unimoe_ray.kuberay import apply as applying
from unimoe_ray.kuberay.client import Cluster, Patience, connect
from unimoe_ray.kuberay.documents import Ref, in_order, read
from unimoe_ray.kuberay.errors import ApiError

QUICK = Patience(attempts=3, answer_s=20.0, first_pause_s=0.02, longest_pause_s=0.1)
OVERLAYS = sorted(file.parent for file in Path(__file__).parents[2].glob("k8s/overlays/*/kustomization.yaml"))
PASSWORD = "correct-horse-battery"


@pytest.fixture
def cluster(front: CoreApi, tmp_path) -> Cluster:
    return connect(front.kubeconfig(tmp_path / "kubeconfig", namespace="unimoe"), patience=QUICK)


@pytest.fixture
def real(api_server, request) -> Cluster:
    """The real API server itself, in a namespace of the test's own."""
    return connect(api_server.kubeconfig, namespace=request.node.name[:60].replace("_", "-").lower(), patience=QUICK)


def overlay(name: str) -> list[dict]:
    """Small, of every sort, in no good order."""
    at = {"namespace": "unimoe"}
    return [
        ray_service(f"{name}-service", "unimoe"),
        ray_job(f"{name}-align", "unimoe"),
        ray_cluster(f"{name}-cluster", "unimoe"),
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PodMonitor",
            "metadata": {"name": "ray"} | at,
            "spec": {"selector": {}, "podMetricsEndpoints": [{"port": "metrics"}]},
        },
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"} | at, "data": {"seed": "0"}},
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "redis"} | at,
            "stringData": {"password": PASSWORD},
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "runs"} | at,
            "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "10Gi"}}},
        },
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "unimoe"}},
    ]


def lines(changes) -> list[str]:
    return [str(change) for change in changes]


def delete(cluster: Cluster, documents: list[dict], with_data: bool = False) -> list[str]:
    return lines(applying.delete(cluster, [Ref.of(document, "") for document in documents], with_data))


def test_a_whole_overlay(cluster, front):
    documents = overlay("whole")
    try:
        planned = lines(applying.plan(cluster, documents))
        assert cluster.get(Ref("v1", "Namespace", "", "unimoe")) is None, "a plan writes nothing"
        expected = [
            "namespace/unimoe created",
            "secret/redis created",
            "configmap/settings created",
            "persistentvolumeclaim/runs created",
            "podmonitor/ray skipped (the cluster is without the Prometheus operator)",
            "raycluster/whole-cluster created",
            "rayjob/whole-align created",
            "rayservice/whole-service created",
        ]
        assert planned == expected
        assert lines(applying.apply(cluster, documents)) == expected
        assert front.get(documents[5])["data"] == {"password": "Y29ycmVjdC1ob3JzZS1iYXR0ZXJ5"}

        again = lines(applying.apply(cluster, documents))
        assert {line.split()[1] for line in again} == {"unchanged", "skipped"} and len(again) == 8

        changed = copy.deepcopy(documents)
        changed[2]["spec"]["workerGroupSpecs"][0]["replicas"] = 3
        changed[4]["data"] = {"seed": "1"}
        made = [change for change in applying.apply(cluster, changed) if change.action == "configured"]
        assert lines(made) == ["configmap/settings configured", "raycluster/whole-cluster configured"]
        assert made[1].after["metadata"]["generation"] == 2
        assert cluster.get(Ref.of(documents[2], ""))["spec"]["workerGroupSpecs"][0]["replicas"] == 3
    finally:
        delete(cluster, documents, with_data=True)


def test_the_stored_object_is_what_was_applied_plus_defaults(real):
    document = ray_cluster("defaults", real.namespace)
    del document["spec"]["workerGroupSpecs"][0]["minReplicas"]
    stored = real.apply(document)
    assert stored["spec"]["workerGroupSpecs"][0].pop("minReplicas") == 0
    assert without_defaults(stored["spec"], document["spec"]) == document["spec"]
    assert [entry["manager"] for entry in stored["metadata"]["managedFields"]] == ["unimoe"]


def without_defaults(stored, applied):
    """The stored value, less mapping keys that were not applied."""
    if isinstance(applied, dict):
        return {key: without_defaults(stored.get(key), value) for key, value in applied.items()}
    if isinstance(applied, list):
        return [without_defaults(one, other) for one, other in zip(stored, applied, strict=True)]
    return stored


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda folder: folder.name)
def test_the_committed_overlays(front, tmp_path, folder):
    """All of it, to a cluster that has every kind; what is stored is what was given, and defaults."""
    front.served |= KUEUE | PROMETHEUS
    cluster = connect(front.kubeconfig(tmp_path / "kubeconfig"), patience=QUICK)
    documents = read(str(folder))
    delete(cluster, [document for document in documents if document["apiVersion"] == "ray.io/v1"])  # of other tests
    try:
        assert {change.action for change in applying.apply(cluster, documents)} == {"created"}
        for document in documents:
            stored = cluster.get(Ref.of(document, ""))
            assert without_defaults(stored, document) == document
        assert {change.action for change in applying.plan(cluster, documents)} == {"unchanged"}
    finally:
        delete(cluster, documents, with_data=True)


def test_our_validation_comes_before_any_request(cluster, front):
    wrong = ray_cluster("wrong", "unimoe")
    wrong["spec"]["workerGroupSpecs"][0] |= {"minReplica": 1, "maxReplicas": "many"}
    with pytest.raises(UsageError) as caught:
        applying.plan(cluster, [*overlay("wrong"), wrong])
    message = str(caught.value)
    assert "raycluster/wrong: spec.workerGroupSpecs[0].minReplica" in message
    assert "spec.workerGroupSpecs[0].maxReplicas" in message
    assert front.requests == []


def test_what_only_the_server_can_refuse_is_refused_before_the_first_write(cluster, front, real):
    """Another document of the same set is not written either."""
    documents = [ray_cluster("first", "default"), ray_job("second", "default")]
    front.fail(
        "PATCH", "rayjobs/second.*dryRun=All", 422, 'RayJob.ray.io "second" is invalid: spec: of a rule of theirs'
    )
    with pytest.raises(ApiError, match="apply rayjob/second: refused by the API server: .* of a rule of theirs"):
        list(applying.apply(cluster, documents))
    assert real.get(Ref.of(documents[0], "")) is None


def test_a_field_that_cannot_change(real):
    document = ray_cluster("fixed", real.namespace, managedBy="ray.io/kuberay-operator")
    real.apply(document)
    changed = ray_cluster("fixed", real.namespace, managedBy="kueue.x-k8s.io/multikueue")
    with pytest.raises(UsageError, match=r"raycluster/fixed: spec\.managedBy"):
        applying.plan(real, [changed])
    with pytest.raises(ApiError) as caught:  # And the server agrees.
        real.apply(changed)
    assert caught.value.status == 422
    assert "apply raycluster/fixed: refused by the API server: spec.managedBy: " in str(caught.value)
    assert str(caught.value).endswith("the managedBy field is immutable")


def test_an_unknown_field_is_refused_by_the_server_too(real):
    document = ray_job("typo", real.namespace)
    document["spec"]["entrypont"] = "python"
    with pytest.raises(ApiError, match="apply rayjob/typo: refused by the API server: .*entrypont"):
        real.apply(document)


def test_the_status_is_the_operators(real):
    """Through its subresource it changes no generation; applying again leaves it as it is."""
    document = ray_job("status", real.namespace)
    generation = real.apply(document)["metadata"]["generation"]
    play_status(real, document, jobStatus="RUNNING", jobDeploymentStatus="Running")
    stored = real.apply(document)
    assert stored["status"]["jobStatus"] == "RUNNING" and stored["metadata"]["generation"] == generation
    document["spec"]["entrypoint"] = "python -m jobs.tune"
    stored = real.apply(document)
    assert stored["status"]["jobStatus"] == "RUNNING" and stored["metadata"]["generation"] == generation + 1


def scale_as_the_autoscaler_does(real: Cluster, name: str, replicas: int) -> None:
    patch = [{"op": "replace", "path": "/spec/workerGroupSpecs/0/replicas", "value": replicas}]
    client.CustomObjectsApi(real.api).patch_namespaced_custom_object(
        "ray.io",
        "v1",
        real.namespace,
        "rayclusters",
        name,
        patch,
        field_manager="autoscaler",
        _content_type="application/json-patch+json",
    )


def test_the_number_of_workers_stays_the_autoscalers(real):
    document = ray_cluster("scaled", real.namespace, enableInTreeAutoscaling=True)
    real.apply(document)
    scale_as_the_autoscaler_does(real, "scaled", 4)
    assert lines(applying.apply(real, [document])) == [
        "raycluster/scaled unchanged (its autoscaler's number of workers kept)"
    ]
    document["spec"]["workerGroupSpecs"][0]["maxReplicas"] = 8
    assert lines(applying.plan(real, [document]))[0].startswith("raycluster/scaled configured")
    [change] = applying.apply(real, [document])
    [group] = change.after["spec"]["workerGroupSpecs"]
    assert change.action == "configured" and (group["replicas"], group["maxReplicas"]) == (4, 8)


def test_a_cluster_that_someone_else_scaled_without_an_autoscaler_is_a_conflict(real):
    document = ray_cluster("by-hand", real.namespace)
    real.apply(document)
    scale_as_the_autoscaler_does(real, "by-hand", 4)
    with pytest.raises(ApiError, match='owned by "autoscaler".*: spec.workerGroupSpecs; --force-conflicts'):
        applying.plan(real, [document])
    [change] = applying.apply(real, [document], force=True)
    assert change.after["spec"]["workerGroupSpecs"][0]["replicas"] == 1


def test_a_kind_that_the_cluster_must_have(core, tmp_path):
    cluster = connect(core.kubeconfig(tmp_path / "kubeconfig"), patience=QUICK)
    with pytest.raises(ApiError, match=r"does not know the kind RayJob \(ray.io/v1\)"):
        applying.plan(cluster, [ray_job("x")])


def test_twice_the_same(cluster):
    with pytest.raises(UsageError, match="given twice: rayjob/x"):
        applying.plan(cluster, [ray_job("x"), ray_job("x")])


# Differences and secrets


def test_a_difference_shows_what_changes_and_no_secret(cluster):
    documents = overlay("diff")[4:]
    list(applying.apply(cluster, documents))
    changed = copy.deepcopy(documents)
    changed[0]["data"]["seed"] = "7"
    changed[1]["stringData"] |= {"password": "another-long-secret", "user": "a-user-name"}
    planned = {str(change.ref): change for change in applying.plan(cluster, changed)}
    text = applying.difference(planned["configmap/settings"], cluster.redactor)
    assert "-  seed: '0'" in text and "+  seed: '7'" in text and text.startswith("--- configmap/settings (stored)")
    secret = applying.difference(planned["secret/redis"], cluster.redactor)
    assert "-  password: (hidden, before)" in secret and "+  password: (hidden, after)" in secret
    assert "+  user: (hidden, after)" in secret
    assert (
        planned["secret/redis"].action == "configured" and planned["persistentvolumeclaim/runs"].action == "unchanged"
    )
    shown = text + secret
    for value in (PASSWORD, "another-long-secret", "a-user-name"):
        assert value not in shown


def test_an_error_that_repeats_a_secret_does_not_show_it(cluster, front):
    list(applying.apply(cluster, overlay("repeat")[7:]))
    document = overlay("repeat")[5]
    front.fail(
        "PATCH", "secrets", 422, f'Secret "redis" is invalid: data[password]: Invalid value: "{PASSWORD}": too weak'
    )
    with pytest.raises(ApiError) as caught:
        cluster.apply(document)
    assert PASSWORD not in str(caught.value) and "too weak" in str(caught.value)
    wrong = document | {"stringData": {"password": [PASSWORD]}}
    with pytest.raises(UsageError) as refused:
        applying.plan(cluster, [wrong])
    assert PASSWORD not in str(refused.value) and "stringData" in str(refused.value)


# Delete


def test_what_holds_data_stays_unless_told(cluster, front):
    documents = overlay("gone")
    list(applying.apply(cluster, documents))
    told = delete(cluster, documents)
    assert told == [
        "rayservice/gone-service deleted",
        "rayjob/gone-align deleted",
        "raycluster/gone-cluster deleted",
        "podmonitor/ray not there",
        "persistentvolumeclaim/runs kept (it holds what runs have written; --with-data deletes it)",
        "configmap/settings deleted",
        "secret/redis deleted",
        "namespace/unimoe kept (it holds what runs have written; --with-data deletes it)",
    ]
    assert front.get(documents[6]) is not None
    assert "persistentvolumeclaim/runs deleted" in delete(cluster, documents, with_data=True)
    assert front.get(documents[6]) is None and front.get(documents[7]) is None


# Reading


def test_documents_of_files_folders_and_lists(tmp_path, monkeypatch):
    one, two = overlay("read")[4:6]
    (tmp_path / "b.yaml").write_text(yaml.safe_dump_all([one, None, two]))
    (tmp_path / "a.yml").write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "List", "items": [ray_job("x")]}))
    (tmp_path / "notes.txt").write_text("no YAML")
    assert read(str(tmp_path)) == [ray_job("x"), one, two]
    assert read(str(tmp_path / "b.yaml")) == [one, two]
    monkeypatch.setattr("sys.stdin", (tmp_path / "b.yaml").open())
    assert read("-") == [one, two]
    assert [document["kind"] for document in in_order(read(str(tmp_path)))] == ["Secret", "ConfigMap", "RayJob"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("kind: [", "not YAML: while parsing"),
        ("just text", "document 1 is no mapping"),
        ("kind: Pod", "document 1 has no apiVersion"),
        ("{apiVersion: v1, kind: Pod}", "document 1 (Pod) has no metadata.name"),
        ("{apiVersion: v1, kind: Pod, metadata: {generateName: x}}", "document 1 (Pod) has no metadata.name"),
    ],
)
def test_what_is_no_document(tmp_path, text, line):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        read(str(tmp_path / "x.yaml"))
    assert str(caught.value).startswith(f"{tmp_path}/x.yaml: {line}") and "\n" not in str(caught.value)


def test_nothing_to_read(tmp_path):
    with pytest.raises(UsageError, match="no YAML files in this folder"):
        read(str(tmp_path))
    with pytest.raises(UsageError, match="gone: no such file or folder"):
        read(str(tmp_path / "gone"))
