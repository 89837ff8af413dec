"""Every failure that is explained: pods, events and logs as Kubernetes words them, read by the client, in our words."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.kubernetes.core_api import KUEUE, CoreApi, running
from tests.kubernetes.ray_documents import false, ray_cluster, ray_job, ray_service, true
from unimoe_ray.kuberay.client import Cluster, Patience, connect
from unimoe_ray.kuberay.explain import explain
from unimoe_ray.kuberay.observe import observe, pods_of

QUICK = Patience(attempts=2, answer_s=10.0, first_pause_s=0.02)
RAY_KINDS = {
    "ray.io/v1": {
        "rayclusters": ("RayCluster", True),
        "rayjobs": ("RayJob", True),
        "rayservices": ("RayService", True),
    }
}


@pytest.fixture
def api():
    """Everything played, Ray's kinds too: what is looked at here is what a client reads."""
    with running() as served:
        served.served |= RAY_KINDS
        yield served


@pytest.fixture
def cluster(api: CoreApi, tmp_path) -> Cluster:
    return connect(api.kubeconfig(tmp_path / "kubeconfig"), patience=QUICK)


def ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def play_cluster(api: CoreApi, name: str = "c", **status: Any) -> dict:
    """A RayCluster that is not ready."""
    given = {"state": "", "desiredWorkerReplicas": 1, "conditions": [false("HeadPodReady", reason="NotReady")]}
    return api.put(ray_cluster(name) | {"status": given | status})


def play_pod(
    api: CoreApi, name: str, node_type: str = "head", of: str = "c", spec: dict | None = None, **status: Any
) -> dict:
    labels = {"ray.io/cluster": of, "ray.io/node-type": node_type}
    container = {"name": f"ray-{node_type}", "image": "registry.example/unimoe:1"}
    document = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "labels": labels},
        "spec": {"containers": [container]} | (spec or {}),
        "status": {"phase": "Pending"} | status,
    }
    return api.put(document)


def play_event(api: CoreApi, kind: str, name: str, reason: str, message: str, seconds: float = 5, warning: bool = True):
    metadata = {"name": f"{name}.{len(api.requests)}.{reason.lower()}.{abs(hash(message))}", "namespace": "default"}
    api.put(
        {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": metadata,
            "involvedObject": {"kind": kind, "name": name, "namespace": "default"},
            "reason": reason,
            "message": message,
            "type": "Warning" if warning else "Normal",
            "lastTimestamp": ago(seconds),
        }
    )


def found(cluster: Cluster, document: dict) -> list[str]:
    return [str(finding) for finding in explain(observe(cluster, document))]


def state(name: str = "ray-head", restarts: int = 0, ready: bool = False, **rest: Any) -> dict:
    """A container's status."""
    return {"name": name, "image": "registry.example/unimoe:1", "ready": ready, "restartCount": restarts} | rest


def crashed(code: int, reason: str = "Error", **rest: Any) -> dict:
    """Waiting for its next start after a crash."""
    waiting = {"reason": "CrashLoopBackOff", "message": "back-off 40s restarting failed container"}
    return {"state": {"waiting": waiting}, "lastState": {"terminated": {"exitCode": code, "reason": reason}}} | rest


def test_nothing_is_wrong(api, cluster):
    document = api.put(ray_cluster("c") | {"status": {"state": "ready"}})
    ready = [state(ready=True, restarts=3, state={"running": {}}, lastState={"terminated": {"exitCode": 1}})]
    play_pod(api, "c-head", phase="Running", conditions=[true("Ready")], containerStatuses=ready)
    play_event(api, "RayCluster", "c", "FailedToCreateWorkerPod", "exceeded something long ago")
    play_event(api, "Pod", "c-head", "Unhealthy", "Readiness probe failed: connection refused")
    assert found(cluster, document) == []


# Images


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (
            'Failed to pull image "registry.example/unimoe:1": rpc error: code = NotFound desc = failed to pull '
            'and unpack: failed to resolve reference "registry.example/unimoe:1": registry.example/unimoe:1: not found',
            "the registry has no such image or tag",
        ),
        (
            'Failed to pull image "registry.example/unimoe:1": pull access denied, repository does not exist or '
            "may require authorization: server message: insufficient_scope: authorization failed",
            "the registry refuses these credentials, or has no such repository: name a pull secret (imagePullSecrets)",
        ),
        (
            'Failed to pull image: failed to do request: Head "https://registry.example/v2": dial tcp: lookup '
            "registry.example on 10.96.0.10:53: no such host",
            "the node cannot reach the registry",
        ),
        (
            "Failed to pull image: toomanyrequests: You have reached your unauthenticated pull rate limit",
            "the registry's rate limit is reached: pull with credentials, or later",
        ),
        (
            "Failed to pull image: no match for platform in manifest",
            "it is not built for the architecture of the node",
        ),
        ("Failed to pull image: write /var/lib: no space left on device", "the disk of the node is full"),
    ],
)
def test_an_image_that_cannot_be_pulled(api, cluster, event, words):
    document = play_cluster(api)
    backing_off = {
        "waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "registry.example/unimoe:1"'}
    }
    play_pod(api, "c-head", containerStatuses=[state(state=backing_off)])
    play_event(api, "Pod", "c-head", "Failed", event)
    assert found(cluster, document) == [
        f"pod/c-head (head): the image 'registry.example/unimoe:1' cannot be pulled: {words}"
    ]


def test_an_image_whose_name_is_wrong_or_that_must_be_there(api, cluster):
    document = play_cluster(api)
    play_pod(api, "c-head", containerStatuses=[state(state={"waiting": {"reason": "InvalidImageName"}})])
    play_pod(api, "c-w", "worker", containerStatuses=[state(state={"waiting": {"reason": "ErrImageNeverPull"}})])
    assert found(cluster, document) == [
        "pod/c-head (head): the image name 'registry.example/unimoe:1' is not valid",
        "pod/c-w (worker): the image 'registry.example/unimoe:1' is not on the node, and imagePullPolicy is Never",
    ]


# Scheduling

ASKS = {
    "containers": [
        {
            "name": "ray-worker",
            "resources": {"requests": {"cpu": "8", "memory": "64Gi"}, "limits": {"nvidia.com/gpu": 1}},
        }
    ],
    "nodeSelector": {"cloud.example/gpu": "a100"},
}


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            "0/6 nodes are available: 1 node(s) had untolerated taint {node-role.kubernetes.io/control-plane: }, "
            "2 Insufficient cpu, 3 Insufficient nvidia.com/gpu. preemption: 0/6 nodes are available: 6 No preemption "
            "victims found for incoming pod.",
            "no node of 6 fits: 1 has the taint node-role.kubernetes.io/control-plane, which the pod does not "
            "tolerate; 2 lack cpu (the pod asks for 8); 3 lack nvidia.com/gpu (the pod asks for 1)",
        ),
        (
            "0/1 nodes are available: 1 Insufficient memory. preemption: 0/1 nodes are available: 1 No victims.",
            "no node of 1 fits: 1 lacks memory (the pod asks for 64Gi)",
        ),
        (
            "0/3 nodes are available: 2 node(s) had untolerated taint {cloud.google.com/gke-spot: true}, "
            "1 node(s) didn't match Pod's node affinity/selector.",
            "no node of 3 fits: 2 have the taint cloud.google.com/gke-spot=true, which the pod does not tolerate; "
            "1: not the nodes of its selector (cloud.example/gpu=a100)",
        ),
        (
            "0/2 nodes are available: 1 node(s) had volume node affinity conflict, 1 node(s) were unschedulable.",
            "no node of 2 fits: 1: its volume is bound to another zone or node; 1: closed to new pods (cordoned)",
        ),
        (
            "0/2 nodes are available: 1 Too many pods, 1 node(s) didn't match pod topology spread constraints.",
            "no node of 2 fits: 1: full, no more pods allowed on it; 1: its topology spread constraint would be broken",
        ),
        (
            "0/2 nodes are available: pod has unbound immediate PersistentVolumeClaims. preemption: 0/2 nodes are.",
            "no node of 2 fits: its volume claim is not bound",
        ),
        (
            '0/2 nodes are available: persistentvolumeclaim "runs" not found.',
            "no node of 2 fits: its volume claim 'runs' does not exist",
        ),
        ("0/2 nodes are available: 2 something new.", "no node of 2 fits: 2 something new"),
        ("no nodes available to schedule pods", "the cluster has no nodes"),
    ],
)
def test_a_pod_that_fits_nowhere(api, cluster, message, words):
    document = play_cluster(api)
    unschedulable = false("PodScheduled", reason="Unschedulable", message=message)
    play_pod(api, "c-w", "worker", spec=ASKS, conditions=[unschedulable])
    assert found(cluster, document) == [f"pod/c-w (worker): cannot be scheduled: {words}"]


def test_equal_reasons_are_told_once_and_the_autoscalers_answer_with_them(api, cluster):
    document = play_cluster(api)
    message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    for number in range(8):
        name = f"c-w{number}"
        play_pod(
            api, name, "worker", spec=ASKS, conditions=[false("PodScheduled", reason="Unschedulable", message=message)]
        )
    words = "cannot be scheduled: no node of 3 fits: 3 lack nvidia.com/gpu (the pod asks for 1)"
    assert found(cluster, document) == [f"pod/c-w0 (worker) and 7 more: {words}"]
    why = "pod didn't trigger scale-up: 1 max node group size reached"
    play_event(api, "Pod", "c-w0", "NotTriggerScaleUp", why, warning=False)
    play_event(api, "Pod", "c-w1", "TriggeredScaleUp", "pod triggered scale-up: [{gpus 1->2}]", warning=False)
    assert found(cluster, document) == [
        f"pod/c-w0 (worker): {words}. The cluster autoscaler adds none: 1 max node group size reached",
        f"pod/c-w1 (worker): {words}. The cluster autoscaler is adding a node",
        f"pod/c-w2 (worker) and 5 more: {words}",
    ]


def test_a_required_affinity_is_named(api, cluster):
    document = play_cluster(api)
    rule = {"key": "gpu", "operator": "In", "values": ["a100", "h100"]}
    affinity = {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchExpressions": [rule]}]}
        }
    }
    message = "0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector."
    spec = {"affinity": affinity, "containers": []}
    play_pod(
        api, "c-w", "worker", spec=spec, conditions=[false("PodScheduled", reason="Unschedulable", message=message)]
    )
    assert found(cluster, document)[0].endswith("2: not the nodes of its selector (gpu In (a100, h100))")


# Quota, admission


def test_a_quota_that_is_exceeded(api, cluster):
    message = (
        'pods "c-w" is forbidden: exceeded quota: team, requested: limits.memory=64Gi,requests.nvidia.com/gpu=8, used: '
        "limits.memory=200Gi,requests.nvidia.com/gpu=4, limited: limits.memory=256Gi,requests.nvidia.com/gpu=8"
    )
    failure = true("ReplicaFailure", reason="FailedCreateWorkerPod", message=message)
    document = play_cluster(api, conditions=[failure])
    play_event(api, "RayCluster", "c", "FailedToCreateWorkerPod", f"Failed to create worker Pod default/c-w, {message}")
    assert found(cluster, document) == [
        "raycluster/c: the quota 'team' is exceeded: limits.memory 64Gi asked, 200Gi of 256Gi used; "
        "requests.nvidia.com/gpu 8 asked, 4 of 8 used; free some, ask for less, or raise the quota"
    ]


def test_a_webhook_that_stops_the_operator_and_what_it_said_long_ago(api, cluster):
    document = play_cluster(api)
    webhook = (
        'Internal error occurred: failed calling webhook "mpod.kueue.io": failed to call webhook: Post "https://x": EOF'
    )
    play_event(api, "RayCluster", "c", "FailedToCreateHeadPod", f"Failed to create head Pod c-head, {webhook}")
    play_event(api, "RayCluster", "c", "FailedToCreateService", "old news", seconds=3600)
    [line] = found(cluster, document)
    assert line.startswith("raycluster/c: the admission webhook 'mpod.kueue.io' did not answer (Post")


def test_a_submitter_that_may_not_be_made(api, cluster):
    document = api.put(ray_job("j") | {"status": {"jobDeploymentStatus": "Running"}})
    reason = 'pods "j-x" is forbidden: violates PodSecurity "restricted:v1.32": allowPrivilegeEscalation != false'
    play_event(api, "Job", "j", "FailedCreate", f"Error creating: {reason}")
    assert found(cluster, document) == [
        "rayjob/j: the namespace enforces pod security 'restricted:v1.32': allowPrivilegeEscalation != false"
    ]


# Crashes


def test_a_head_that_crashes_with_its_last_lines(api, cluster):
    document = play_cluster(api)
    play_pod(api, "c-head", phase="Running", containerStatuses=[state(restarts=4, **crashed(1))])
    lines = [f"line {number}" for number in range(9)] + ["ValueError: num_gpus must not be negative"]
    api.pod_log("c-head", "ray-head", lines, previous=True)
    [text] = found(cluster, document)
    assert text.splitlines() == [
        "pod/c-head (head): container 'ray-head' crashed with exit code 1 (4 restarts)",
        *(f"    | {line}" for line in lines[-5:]),
    ]


REDIS = "the Redis that keeps the head's state cannot be used"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("redis.exceptions.ConnectionError: Error 111 connecting to redis:6379. Connection refused.", REDIS),
        ("RuntimeError: Unauthenticated: InvalidAuthToken", "the authentication tokens differ"),
        ("OSError: [Errno 28] No space left on device", "its disk is full"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "the GPU's memory is full"),
        ("OSError: [Errno 30] Read-only file system: '/home/ray/x'", "it writes where its file system is read-only"),
        ("ModuleNotFoundError: No module named 'unimoe_ray'", "the image lacks a Python package"),
    ],
)  # fmt: skip
def test_known_last_lines(api, cluster, line, words):
    document = play_cluster(api)
    play_pod(api, "c-head", phase="Running", containerStatuses=[state(restarts=1, **crashed(1))])
    api.pod_log("c-head", "ray-head", [line], previous=True)
    [first, last] = found(cluster, document)[0].splitlines()
    assert first == f"pod/c-head (head): container 'ray-head' crashed with exit code 1 (1 restart): {words}"
    assert last == f"    | {line}"


def test_a_container_out_of_memory(api, cluster):
    document = play_cluster(api)
    spec = {"containers": [{"name": "ray-worker", "resources": {"limits": {"memory": "4Gi"}}}]}
    status = state("ray-worker", restarts=2, **crashed(137, "OOMKilled"))
    play_pod(api, "c-w", "worker", spec=spec, phase="Running", containerStatuses=[status])
    assert found(cluster, document) == [
        "pod/c-w (worker): container 'ray-worker' was killed: out of memory, its limit is 4Gi (2 restarts); "
        "`unimoe k8s size` shows what it needs"
    ]


def test_other_ends(api, cluster):
    document = play_cluster(api)
    for name, code in (("a", 137), ("b", 139), ("d", 143)):
        ended = {"state": {"terminated": {"exitCode": code, "reason": "Error"}}}
        play_pod(api, name, "worker", phase="Failed", containerStatuses=[state("ray-worker", **ended)])
        api.pod_log(name, "ray-worker", [f"the end of {name}"])
    assert found(cluster, document) == [
        "pod/a (worker): container 'ray-worker' was killed (SIGKILL)\n    | the end of a",
        "pod/b (worker): container 'ray-worker' crashed (segmentation fault)\n    | the end of b",
        "pod/d (worker): container 'ray-worker' was ended (SIGTERM)\n    | the end of d",
    ]


def test_a_secret_in_the_last_lines_is_not_shown(api, cluster):
    document = play_cluster(api)
    play_pod(api, "c-head", phase="Running", containerStatuses=[state(restarts=1, **crashed(1))])
    api.pod_log("c-head", "ray-head", ["login with redis-password=hunter2hunter2 failed"], previous=True)
    assert (
        "hunter2" not in found(cluster, document)[0] and "redis-password=(hidden) failed" in found(cluster, document)[0]
    )


# What containers wait for


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ('secret "redis" not found', "the secret 'redis' does not exist in the namespace"),
        ('configmap "settings" not found', "the configmap 'settings' does not exist in the namespace"),
        ("couldn't find key password in Secret default/redis", "the secret 'redis' has no key 'password'"),
        (
            "container has runAsNonRoot and image will run as root",
            "container has runAsNonRoot and image will run as root",
        ),
    ],
)
def test_a_container_that_cannot_be_made(api, cluster, message, words):
    document = play_cluster(api)
    waiting = {"waiting": {"reason": "CreateContainerConfigError", "message": message}}
    play_pod(api, "c-head", containerStatuses=[state(state=waiting)])
    assert found(cluster, document) == [f"pod/c-head (head): container 'ray-head' cannot be started: {words}"]


def worker_waits(api: CoreApi, head_ready: bool) -> dict:
    document = play_cluster(api)
    head = [state(ready=head_ready, state={"running": {}})]
    play_pod(
        api, "c-head", phase="Running", conditions=[(true if head_ready else false)("Ready")], containerStatuses=head
    )
    play_pod(api, "c-w", "worker", initContainerStatuses=[state("wait-gcs-ready", state={"running": {}})])
    api.pod_log(
        "c-w",
        "wait-gcs-ready",
        ["0 seconds elapsed: Waiting for GCS to be ready.", "Unauthenticated: InvalidAuthToken"],
    )
    return document


def test_a_worker_that_cannot_reach_the_head(api, cluster):
    [line] = found(cluster, worker_waits(api, head_ready=True))
    assert line.startswith(
        "pod/c-w (worker): cannot reach the head's GCS although the head is ready: a NetworkPolicy, DNS or a differing "
        "authentication token may be in the way: the authentication tokens differ\n    | 0 seconds elapsed"
    )


def test_a_worker_that_waits_for_a_head_that_is_not_ready_is_no_failure_of_its_own(api, cluster):
    document = worker_waits(api, head_ready=False)
    play_event(api, "Pod", "c-head", "Unhealthy", "Readiness probe failed: success")
    assert found(cluster, document) == ["pod/c-head (head): does not answer its probe: Readiness probe failed: success"]


@pytest.mark.parametrize(
    ("reason", "message", "words"),
    [
        (
            "FailedMount",
            'MountVolume.SetUp failed for volume "config" : configmap "settings" not found',
            "a volume cannot be mounted: the configmap 'settings' does not exist in the namespace",
        ),
        (
            "FailedAttachVolume",
            'Multi-Attach error for volume "pvc-1" Volume is already used by pod(s) other',
            "its volume is in use on another node (ReadWriteOnce)",
        ),
        ("FailedCreatePodSandBox", "no IP left", "the node cannot set up its network: no IP left"),
    ],
)
def test_a_pod_that_is_stuck(api, cluster, reason, message, words):
    document = play_cluster(api)
    waiting = [state(state={"waiting": {"reason": "ContainerCreating"}})]
    play_pod(api, "c-head", conditions=[true("PodScheduled")], containerStatuses=waiting)
    play_event(api, "Pod", "c-head", reason, message)
    assert found(cluster, document) == [f"pod/c-head (head): {words}"]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (
            {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: ephemeral-storage."},
            "was evicted: The node was low on resource: ephemeral-storage.",
        ),
        (
            {"phase": "Running", "conditions": [true("DisruptionTarget", reason="TerminationByKubelet")]},
            "is taken off its node: its node shuts down or is short of a resource (a spot node reclaimed?)",
        ),
        (
            {"phase": "Running", "conditions": [true("DisruptionTarget", reason="PreemptionByScheduler")]},
            "is taken off its node: made room for a pod of higher priority",
        ),
        (
            {"conditions": [false("PodScheduled", reason="SchedulingGated", message="gated")]},
            "held back by a scheduling gate",
        ),
    ],
)
def test_a_pod_that_was_taken_away_or_held_back(api, cluster, status, words):
    document = play_cluster(api)
    play_pod(api, "c-w", "worker", **status)
    assert found(cluster, document) == [f"pod/c-w (worker): {words}"]


# Claims


@pytest.mark.parametrize(
    ("phase", "reason", "message", "words"),
    [
        (
            "Pending",
            "ProvisioningFailed",
            'storageclass.storage.k8s.io "fast" not found',
            "the storage class 'fast' does not exist in this cluster",
        ),
        (
            "Pending",
            "FailedBinding",
            "no persistent volumes available for this claim and no storage class is set",
            "no volume for it: no persistent volumes available for this claim and no storage class is set",
        ),
        (
            "Pending",
            "ProvisioningFailed",
            'failed to provision volume with class "std": ReadWriteMany is not supported',
            'its volume cannot be made: failed to provision volume with class "std": ReadWriteMany is not supported',
        ),
        ("Lost", "ClaimLost", "Bound claim has lost reference", "its volume is gone, and the data with it"),
    ],
)
def test_a_claim_without_a_volume(api, cluster, phase, reason, message, words):
    document = play_cluster(api)
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "runs", "namespace": "default"}}
    api.put(claim | {"spec": {}, "status": {"phase": phase}})
    play_event(api, "PersistentVolumeClaim", "runs", reason, message)
    unbound = "0/2 nodes are available: pod has unbound immediate PersistentVolumeClaims."
    spec = {"volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}}]}
    play_pod(api, "c-head", spec=spec, conditions=[false("PodScheduled", reason="Unschedulable", message=unbound)])
    assert found(cluster, document) == [
        f"pvc/runs: {words}",
        "pod/c-head (head): cannot be scheduled: no node of 2 fits: its volume claim is not bound",
    ]


# Ray's own resources


def test_nobody_takes_it_up(api, cluster):
    document = ray_job("j")
    document["metadata"]["creationTimestamp"] = ago(60)
    assert found(cluster, api.put(document)) == [
        "rayjob/j: no operator has taken it up: is KubeRay installed, and does it watch this namespace?"
    ]
    document["metadata"] |= {"name": "young", "creationTimestamp": ago(2)}
    assert found(cluster, api.put(document)) == []


def test_a_job_that_waits_for_its_queue(tmp_path):
    with running() as api:
        api.served |= RAY_KINDS | KUEUE
        cluster = connect(api.kubeconfig(tmp_path / "kubeconfig"), patience=QUICK)
        document = ray_job("j", suspend=True)
        document["metadata"] |= {"labels": {"kueue.x-k8s.io/queue-name": "gpus"}, "creationTimestamp": ago(60)}
        document = api.put(document)
        assert found(cluster, document) == ["rayjob/j: waits for admission by the queue 'gpus'"]
        message = (
            "couldn't assign flavors to pod set head: insufficient unused quota for nvidia.com/gpu in spot, 8 more"
        )
        labels = {"kueue.x-k8s.io/job-uid": document["metadata"]["uid"]}
        api.put(
            {
                "apiVersion": "kueue.x-k8s.io/v1beta2",
                "kind": "Workload",
                "metadata": {"name": "rayjob-j-12345", "namespace": "default", "labels": labels},
                "status": {"conditions": [false("QuotaReserved", reason="Pending", message=message)]},
            }
        )
        assert found(cluster, document) == [f"rayjob/j: waits for admission by the queue 'gpus': {message}"]


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("AppFailed", "the program ended with an error"),
        ("DeadlineExceeded", "it ran longer than activeDeadlineSeconds allows"),
        ("SubmissionFailed", "it could not be submitted to its cluster"),
        ("SomethingNew", "failed (SomethingNew)"),
    ],
)
def test_a_job_that_failed(api, cluster, reason, words):
    message = (
        "Job entrypoint command failed with exit code 1, last available logs:\nTraceback\nValueError: no such preset"
    )
    status = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": reason, "message": message}
    [line] = found(cluster, api.put(ray_job("j") | {"status": status}))
    assert line.splitlines() == [f"rayjob/j: {words}", *(f"    | {text}" for text in message.splitlines())]


def test_serve_applications_that_fail(api, cluster):
    broken = {
        "status": "DEPLOYING",
        "serveDeploymentStatuses": {
            "Ingress": {"status": "HEALTHY"},
            "ImageEncoder": {
                "status": "UNHEALTHY",
                "message": "The deployment failed to start 3 times\nOSError: no weights",
            },
        },
    }
    refused = {"status": "DEPLOY_FAILED", "message": "ImportError: cannot import name 'app'"}
    status = {
        "activeServiceStatus": {"applicationStatuses": {"mini": broken}},
        "pendingServiceStatus": {"applicationStatuses": {"next": refused}},
    }
    assert found(cluster, api.put(ray_service("s") | {"status": status})) == [
        "rayservice/s: application 'mini', deployment 'ImageEncoder' is unhealthy\n"
        "    | The deployment failed to start 3 times\n    | OSError: no weights",
        "rayservice/s: application 'next' could not be deployed\n    | ImportError: cannot import name 'app'",
    ]


def test_a_job_is_explained_by_its_cluster_and_its_submitter(api, cluster):
    play_cluster(api, "j-x")
    document = api.put(ray_job("j") | {"status": {"jobDeploymentStatus": "Running", "rayClusterName": "j-x"}})
    play_pod(api, "j-x-head", of="j-x", containerStatuses=[state(state={"waiting": {"reason": "InvalidImageName"}})])
    submitter = play_pod(
        api, "j-abc", "", phase="Running", containerStatuses=[state("submitter", restarts=1, **crashed(1))]
    )
    labels = {"ray.io/originated-from-crd": "RayJob", "ray.io/originated-from-cr-name": "j"}
    api.put(submitter | {"metadata": submitter["metadata"] | {"labels": labels}})
    play_pod(api, "another", of="elsewhere")
    assert [pod["metadata"]["name"] for pod in pods_of(cluster, document)] == ["j-x-head", "j-abc"]
    assert found(cluster, document) == [
        "pod/j-x-head (head): the image name 'registry.example/unimoe:1' is not valid",
        "pod/j-abc: container 'submitter' crashed with exit code 1 (1 restart)",
    ]
