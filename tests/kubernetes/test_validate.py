"""Planted mistakes: our validation finds them before any request, says where and why; the real API server agrees."""

from __future__ import annotations

import json

import pytest
import yaml

from tests.kubernetes.conftest import crds
from tests.kubernetes.documents import ABSENT, changed, ray_cluster, ray_job, ray_service
from unimoe_ray.kuberay.models import KINDS
from unimoe_ray.kuberay.validate import validate

CLUSTER, JOB, SERVICE = ray_cluster(), ray_job(), ray_service()
GROUP, HEAD = "spec.workerGroupSpecs.0", "spec.headGroupSpec"
POD = f"{HEAD}.template.spec.containers.0"
RULE = "spec.deletionStrategy.deletionRules.0"
UPGRADE = "spec.upgradeStrategy.clusterUpgradeOptions"

# What the API server refuses: document, where the change is, the value, the path that is named, words of the reason.
REFUSED = [
    (CLUSTER, "spec.foo", 1, "spec.foo", "unknown field"),
    (CLUSTER, f"{GROUP}.minReplica", 1, "spec.workerGroupSpecs[0].minReplica", "did you mean 'minReplicas'"),
    (
        CLUSTER,
        f"{POD}.imagePullPolcy",
        "Always",
        "spec.headGroupSpec.template.spec.containers[0].imagePullPolcy",
        "did",
    ),
    (CLUSTER, "spec.autoscalerOptions.idleTimeout", 5, "spec.autoscalerOptions.idleTimeout", "idleTimeoutSeconds"),
    (JOB, "spec.rayClusterSpec.headGroup", {}, "spec.rayClusterSpec.headGroup", "headGroupSpec"),
    (SERVICE, "spec.serveConfig", "", "spec.serveConfig", "serveConfigV2"),
    (CLUSTER, f"{GROUP}.maxReplicas", "5", "spec.workerGroupSpecs[0].maxReplicas", "integer"),
    (CLUSTER, f"{GROUP}.replicas", 1.5, "spec.workerGroupSpecs[0].replicas", "integer"),
    (CLUSTER, f"{GROUP}.replicas", 3_000_000_000, "spec.workerGroupSpecs[0].replicas", "2147483647"),
    (CLUSTER, "spec.suspend", "yes", "spec.suspend", "boolean"),
    (CLUSTER, "spec.rayVersion", 2.6, "spec.rayVersion", "quote it"),
    (CLUSTER, f"{HEAD}.rayStartParams", {"num-cpus": 0}, "spec.headGroupSpec.rayStartParams.num-cpus", "quote it: '0'"),
    (CLUSTER, f"{POD}.env", [{"name": "A", "value": 1}], "template.spec.containers[0].env[0].value", "quote it: '1'"),
    (CLUSTER, f"{POD}.resources.limits.memory", "4 GB", "containers[0].resources.limits.memory", "quantity"),
    (CLUSTER, f"{POD}.ports", [{"name": "serve"}], "containers[0].ports[0].containerPort", "is missing"),
    (CLUSTER, f"{POD}.name", ABSENT, "containers[0].name", "is missing"),
    (CLUSTER, f"{HEAD}.template.spec.containers", {"name": "ray"}, "template.spec.containers", "must be a list"),
    (CLUSTER, "metadata.labels", {"a": 1}, "metadata.labels.a", "quote it"),
    (CLUSTER, "metadata.name", "Upper_case", "metadata.name", "lower case"),
    (CLUSTER, HEAD, ABSENT, "spec.headGroupSpec", "is missing"),
    (CLUSTER, f"{HEAD}.template", ABSENT, "spec.headGroupSpec.template", "is missing"),
    (CLUSTER, f"{GROUP}.template", ABSENT, "spec.workerGroupSpecs[0].template", "is missing"),
    (CLUSTER, f"{GROUP}.groupName", ABSENT, "spec.workerGroupSpecs[0].groupName", "is missing"),
    (SERVICE, "spec.rayClusterConfig", ABSENT, "spec.rayClusterConfig", "is missing"),
    (CLUSTER, "spec.workerGroupSpecs", {"groupName": "a"}, "spec.workerGroupSpecs", "list"),
    (CLUSTER, "spec.authOptions.mode", "tokens", "spec.authOptions.mode", "'disabled' or 'token'"),
    (CLUSTER, "spec.autoscalerOptions.version", "v3", "spec.autoscalerOptions.version", "'v1' or 'v2'"),
    (CLUSTER, "spec.autoscalerOptions.upscalingMode", "Fast", "spec.autoscalerOptions.upscalingMode", "'Aggressive'"),
    (CLUSTER, "spec.upgradeStrategy", {"type": "NewCluster"}, "spec.upgradeStrategy.type", "'Recreate' or 'None'"),
    (CLUSTER, "spec.gcsFaultToleranceOptions.backend", "etcd", "gcsFaultToleranceOptions.backend", "'rocksdb'"),
    (CLUSTER, "spec.managedBy", "me", "spec.managedBy", "kuberay-operator"),
    (CLUSTER, "spec.networkPolicy", {"mode": "Deny"}, "spec.networkPolicy.mode", "'DenyAll'"),
    (JOB, "spec.deletionStrategy", {"onSuccess": {"policy": "DeleteSelf"}}, "spec.deletionStrategy", "onFailure"),
    (JOB, "spec.deletionStrategy.onSuccess", {"policy": "DeleteSelf"}, "spec.deletionStrategy", "only one way"),
    (JOB, "spec.deletionStrategy.deletionRules", [], "spec.deletionStrategy.deletionRules", "at least 1"),
    (JOB, f"{RULE}.condition.jobDeploymentStatus", "Failed", "deletionRules[0].condition", "not both"),
    (JOB, f"{RULE}.condition.jobStatus", ABSENT, "deletionRules[0].condition", "jobStatus or"),
    (JOB, f"{RULE}.condition.jobStatus", "STOPPED", "deletionRules[0].condition.jobStatus", "'SUCCEEDED'"),
    (JOB, f"{RULE}.condition.ttlSeconds", -1, "deletionRules[0].condition.ttlSeconds", "greater than or equal to 0"),
    (JOB, f"{RULE}.policy", "DeleteAll", "deletionRules[0].policy", "'DeleteSelf'"),
    (JOB, "spec.preRunningDeadlineSeconds", 0, "spec.preRunningDeadlineSeconds", "greater than or equal to 1"),
    (
        SERVICE,
        "spec.rayClusterDeletionDelaySeconds",
        -1,
        "spec.rayClusterDeletionDelaySeconds",
        "greater than or equal",
    ),
    (SERVICE, f"{UPGRADE}.gatewayClassName", ABSENT, f"{UPGRADE}.gatewayClassName", "is missing"),
    (SERVICE, f"{UPGRADE}.stepSizePercent", "10", f"{UPGRADE}.stepSizePercent", "integer"),
    (CLUSTER, "apiVersion", "ray.io/v2", "kind", "known: RayCluster, RayJob, RayService of ray.io/v1"),
]
# What only the operator refuses, later: the API server takes it.
REFUSED_LATER = [
    (CLUSTER, f"{GROUP}.minReplicas", 4, "spec.workerGroupSpecs[0].minReplicas", "is 4, above maxReplicas, 3"),
    (CLUSTER, f"{GROUP}.minReplicas", -1, "spec.workerGroupSpecs[0].minReplicas", "must be from 0"),
    (CLUSTER, "metadata.name", "a" * 54, "metadata.name", "a RayCluster may have 53"),
    (CLUSTER, f"{HEAD}.template.spec.containers", [], "spec.headGroupSpec.template.spec.containers", "is empty"),
    (CLUSTER, f"{HEAD}.resources", {"CPU": "0"}, "spec.headGroupSpec.resources", "rayStartParams.num-cpus"),
    (CLUSTER, f"{HEAD}.rayStartParams.labels", "a=b", "spec.headGroupSpec.rayStartParams.labels", "the group's labels"),
    (CLUSTER, f"{GROUP}.labels", {"a": "b,c"}, "spec.workerGroupSpecs[0].labels.a", "up to 63"),
    (CLUSTER, f"{GROUP}.template.spec.restartPolicy", "Always", "template.spec.restartPolicy", "must be Never"),
    (CLUSTER, f"{GROUP}.suspend", True, "spec.workerGroupSpecs[0].suspend", "enableInTreeAutoscaling"),
    (CLUSTER, "spec.rayVersion", ABSENT, "spec.rayVersion", "authOptions.mode: token"),
    (CLUSTER, "spec.rayVersion", "2.9.0", "spec.rayVersion", "needs 2.52"),
    (CLUSTER, f"{POD}.env", [{"name": "REDIS_PASSWORD", "value": "x"}], "headGroupSpec.template", "redisPassword"),
    (JOB, "spec.suspend", True, "spec.suspend", "shutdownAfterJobFinishes: true"),
    (JOB, "spec.ttlSecondsAfterFinished", 60, "spec.ttlSecondsAfterFinished", "shutdownAfterJobFinishes: true"),
    (JOB, "spec.shutdownAfterJobFinishes", True, "spec.deletionStrategy.deletionRules", "only one is allowed"),
    (JOB, f"{RULE}.policy", "DeleteWorkers", "deletionRules[0].policy", "enableInTreeAutoscaling"),
    (JOB, "spec.rayClusterSpec", ABSENT, "spec.rayClusterSpec", "clusterSelector"),
    (JOB, "spec.clusterSelector", {"ray.io/cluster": "a"}, "spec.backoffLimit", "clusterSelector"),
    (JOB, "spec.submissionMode", "Local", "spec.submissionMode", "K8sJobMode"),
    (JOB, "spec.activeDeadlineSeconds", 0, "spec.activeDeadlineSeconds", "must be from 1"),
    (SERVICE, "spec.upgradeStrategy.type", "Rolling", "spec.upgradeStrategy.type", "NewCluster"),
    (SERVICE, "spec.upgradeStrategy.clusterUpgradeOptions", ABSENT, UPGRADE, "is missing"),
    (SERVICE, f"{UPGRADE}.stepSizePercent", 60, f"{UPGRADE}.stepSizePercent", "maxSurgePercent, 50"),
    (SERVICE, "spec.rayClusterConfig.enableInTreeAutoscaling", False, "spec.upgradeStrategy.type", "needs"),
]


def named(case) -> str:
    document, where, value, *_ = case
    return f"{document['kind']}-{where}-{'absent' if value is ABSENT else str(value)[:20]}"


@pytest.mark.parametrize("document", [CLUSTER, JOB, SERVICE], ids=lambda document: document["kind"])
def test_what_is_right_has_no_problems_and_the_server_takes_it(api_server, document):
    assert validate(document) == []
    status, message = api_server.create(document)
    assert status == 201, message


@pytest.mark.parametrize("case", REFUSED, ids=named)
def test_a_mistake_is_found_before_the_request_and_the_server_agrees(api_server, case):
    document, where, value, path, reason = case
    wrong = changed(document, where, value)
    problems = validate(wrong)
    assert len(problems) == 1, problems
    assert problems[0].path.endswith(path) and reason in problems[0].reason
    status, message = api_server.create(wrong)
    assert status in (400, 404, 422), f"the server takes it: {status} {message}"


@pytest.mark.parametrize("case", REFUSED_LATER, ids=named)
def test_what_the_operator_would_refuse_is_found_too(api_server, case):
    """The server takes it; else it belongs to the other list."""
    document, where, value, path, reason = case
    wrong = changed(document, where, value)
    problems = validate(wrong)
    assert any(found.path.endswith(path) and reason in found.reason for found in problems), problems
    status, message = api_server.create(wrong)
    assert status == 201, message


@pytest.mark.parametrize(
    ("path", "value"),
    [("spec.managedBy", "kueue.x-k8s.io/multikueue"), ("spec.gcsFaultToleranceOptions.backend", "rocksdb")],
)
def test_a_change_of_what_is_immutable(api_server, path, value):
    document = ray_cluster(f"immutable-{path.rsplit('.')[-1].lower()}")
    after = changed(document, path, value)
    apply = ("apply", "--server-side", "--field-manager=test", "-f", "-")
    assert api_server.kubectl(*apply, stdin=json.dumps(document)).returncode == 0
    assert validate(after) == []
    assert [problem.path for problem in validate(after, stored=document)] == [path]
    answer = api_server.kubectl(*apply, stdin=json.dumps(after))
    assert answer.returncode != 0 and "immutable" in answer.stderr


def test_a_change_of_what_is_not_immutable(api_server):
    document = ray_cluster("update")
    after = changed(document, f"{GROUP}.maxReplicas", 7)
    assert validate(after, stored=document) == []
    for each in (document, after):
        answer = api_server.kubectl("apply", "--server-side", "--field-manager=test", "-f", "-", stdin=json.dumps(each))
        assert answer.returncode == 0, answer.stderr
    stored = json.loads(api_server.kubectl("-n", "unimoe", "get", "raycluster", "update", "-o", "json").stdout)
    assert stored["spec"]["workerGroupSpecs"][0]["maxReplicas"] == 7
    assert stored["metadata"]["generation"] == 2


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_models_have_exactly_the_fields_of_the_definitions(kind):
    text = (crds() / f"ray.io_{kind.lower()}s.yaml").read_text()
    definition = yaml.load(text, Loader=yaml.CSafeLoader)
    version = next(version for version in definition["spec"]["versions"] if version["name"] == "v1")
    differences = list(_differences(KINDS[kind], version["schema"]["openAPIV3Schema"], kind))
    assert not differences, "\n".join(differences)


def _differences(model, schema, path):
    from unimoe_ray.kuberay.validate import _kinds

    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    wanted = schema["properties"]
    if fields.keys() != wanted.keys():
        yield f"{path}: {sorted(fields.keys() ^ wanted.keys())}"
    required = {key for key, field in fields.items() if field.is_required()} - {"metadata", "spec"}
    # A field that is required and has a default may be left out.
    needed = {key for key in schema.get("required", []) if "default" not in wanted[key]}
    if required != needed:
        yield f"{path}: required are {sorted(needed)}, not {sorted(required)}"
    for key, field in fields.items():
        for kind in _kinds(field.annotation):
            inner, below = (kind[0], wanted[key]["items"]) if isinstance(kind, tuple) else (kind, wanted[key])
            if isinstance(inner, type):
                yield from _differences(inner, below, f"{path}.{key}")
