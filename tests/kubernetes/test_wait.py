"""Waiting: against a real API server while a test plays the operator, and through every way to lose a watch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.kubernetes.core_api import CoreApi
from tests.kubernetes.ray_documents import false, play_status, ray_cluster, ray_job, ray_service, true
from unimoe_ray.errors import UsageError
from unimoe_ray.kuberay.client import Cluster, Patience, connect
from unimoe_ray.kuberay.conditions import check_for
from unimoe_ray.kuberay.documents import Ref
from unimoe_ray.kuberay.errors import ApiError
from unimoe_ray.kuberay.wait import WaitFailed, WaitTimeout, wait, wait_deleted

LIMIT_S = 30.0
NEVER_S = 600.0
QUICK = Patience(attempts=2, connect_s=10.0, answer_s=30.0, first_pause_s=0.05, longest_pause_s=0.2)


@pytest.fixture
def real(api_server, request) -> Cluster:
    name = "".join(c if c.isalnum() else "-" for c in request.node.name.lower())[:60].strip("-")
    return connect(api_server.kubeconfig, namespace=name, patience=QUICK)


@pytest.fixture
def played(core: CoreApi, tmp_path) -> Cluster:
    return connect(core.kubeconfig(tmp_path / "kubeconfig"), patience=QUICK)


class Lines(list):
    """What a wait reported, each line once."""

    def __call__(self, line: str, document=None) -> None:
        if line not in self[-1:]:
            self.append(line)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def meanwhile(*steps: Callable[[], object]) -> Iterator[Lines]:
    """The steps in a thread, each once the wait has reported what the one before it (at first: what is there) led to,
    so that it sees them all. Yields what is to be told the reports. The steps' errors are the test's."""
    errors: list[Exception] = []
    lines = Lines()

    def run() -> None:
        try:
            for number, step in enumerate(steps):
                until(lambda number=number: len(lines) > number)
                step()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield lines
    finally:
        thread.join(LIMIT_S)
        assert not errors, [*errors, *lines]


# The operator's updates, on the real API server


def test_a_job_from_its_creation_to_its_success(real):
    document = ray_job("works", real.namespace)
    real.apply(document)

    def step(**status):
        return lambda: play_status(real, document, **status)

    ref = Ref.of(document, "")
    workers = {"desiredWorkerReplicas": 2, "readyWorkerReplicas": 1, "state": ""}
    with meanwhile(
        step(jobDeploymentStatus="Initializing", rayClusterName="works-x"),
        step(rayClusterStatus=workers | {"conditions": [true("HeadPodReady")]}),
        step(jobDeploymentStatus="Running"),
        step(jobStatus="RUNNING"),
        step(jobStatus="SUCCEEDED"),
        step(jobDeploymentStatus="Complete"),
    ) as lines:
        done = wait(real, ref, check_for(ref), LIMIT_S, lines)
    assert done["status"]["jobStatus"] == "SUCCEEDED"
    assert lines == [
        "not taken up by an operator yet",
        "waits for its cluster",
        "waits for its cluster: starting, 1 of 2 workers ready",
        "running (job not submitted yet)",
        "running (RUNNING)",
        "running (SUCCEEDED)",
        "succeeded",
    ]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (
            {
                "jobDeploymentStatus": "Failed",
                "jobStatus": "FAILED",
                "reason": "AppFailed",
                "message": "Traceback (most recent call last):\n  ...\nValueError: no such file\n",
            },
            "failed (AppFailed: ValueError: no such file)",
        ),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, "was stopped"),
        (
            {"jobDeploymentStatus": "ValidationFailed", "reason": "ValidationFailed", "message": "no entrypoint"},
            "the operator refuses the specification (ValidationFailed: no entrypoint)",
        ),
    ],
)
def test_a_job_that_fails_ends_the_wait(real, status, words):
    document = ray_job("fails", real.namespace)
    ref = Ref.of(document, "")
    real.apply(document)
    # At once: neither at the next tick nor at the limit.
    with meanwhile(lambda: play_status(real, document, **status)) as lines, pytest.raises(WaitFailed) as caught:
        wait(real, ref, check_for(ref), NEVER_S, lines, tick_s=NEVER_S)
    assert str(caught.value) == f"rayjob/fails {words}"
    real.delete(ref)


def test_a_cluster_is_ready_when_head_and_workers_are(real):
    document = ray_cluster("pool", real.namespace)
    ref = Ref.of(document, "")
    generation = real.apply(document)["metadata"]["generation"]
    counts = {"desiredWorkerReplicas": 1, "readyWorkerReplicas": 0, "observedGeneration": generation}
    with meanwhile(
        lambda: play_status(real, document, conditions=[false("HeadPodReady", reason="ContainersNotReady")], **counts),
        lambda: play_status(real, document, conditions=[true("HeadPodReady")]),
        lambda: play_status(real, document, readyWorkerReplicas=1, state="ready"),
    ) as lines:
        wait(real, ref, check_for(ref), LIMIT_S, lines)
    assert lines == [
        "not taken up by an operator yet",
        "head ContainersNotReady, 0 of 1 workers ready",
        "starting, 0 of 1 workers ready",
        "ready, 1 of 1 workers ready",
    ]
    # A change makes what the status says old news, until the operator has seen it.
    document["spec"]["workerGroupSpecs"][0]["maxReplicas"] = 9
    real.apply(document)
    with pytest.raises(WaitTimeout, match="raycluster/pool after 0.5 s: the operator has not seen the last change yet"):
        wait(real, ref, check_for(ref), 0.5)
    with meanwhile(lambda: play_status(real, document, observedGeneration=generation + 1)) as lines:
        wait(real, ref, check_for(ref), LIMIT_S, lines)


def test_a_service_is_ready_after_its_upgrade(real):
    document = ray_service("api", real.namespace)
    ref = Ref.of(document, "")
    generation = real.apply(document)["metadata"]["generation"]
    seen = {"observedGeneration": generation}
    ready = true("Ready", reason="NonZeroServeEndpoints")
    with meanwhile(
        lambda: play_status(real, document, conditions=[false("Ready", reason="Initializing")], **seen),
        lambda: play_status(
            real,
            document,
            conditions=[ready, true("UpgradeInProgress")],
            numServeEndpoints=2,
            pendingServiceStatus={"trafficRoutedPercent": 40},
        ),
        lambda: play_status(real, document, conditions=[ready, false("UpgradeInProgress")]),
    ) as lines:
        wait(real, ref, check_for(ref), LIMIT_S, lines)
    assert lines == [
        "not taken up by an operator yet",
        "0 endpoints (Initializing)",
        "upgrade under way, 40 % of the traffic on the new cluster, 2 endpoints",
        "ready, 2 endpoints",
    ]
    play_status(real, document, conditions=[false("Ready", reason="ValidationFailed", message="no such gateway")])
    with pytest.raises(WaitFailed, match=r"cannot start \(ValidationFailed: no such gateway\)"):
        wait(real, ref, check_for(ref), LIMIT_S)


def test_a_condition_by_name(real):
    document = ray_cluster("named", real.namespace)
    ref = Ref.of(document, "")
    real.apply(document)
    with meanwhile(lambda: play_status(real, document, conditions=[true("RayClusterProvisioned")])) as lines:
        wait(real, ref, check_for(ref, "condition=RayClusterProvisioned"), LIMIT_S, lines)
    wait(real, ref, check_for(ref, "condition=RayClusterProvisioned=True"), LIMIT_S)
    with pytest.raises(WaitTimeout, match=r"RayClusterProvisioned is True \(Played\)"):
        wait(real, ref, check_for(ref, "condition=RayClusterProvisioned=False"), 0.5)
    with pytest.raises(UsageError, match="--for soon: allowed: ready"):
        check_for(ref, "soon")


def test_what_is_not_there_and_what_goes_away(real):
    document = ray_cluster("short", real.namespace)
    ref = Ref.of(document, "")
    with pytest.raises(WaitFailed, match=f"raycluster/short not found in namespace {real.namespace}"):
        wait(real, ref, check_for(ref), LIMIT_S)
    real.apply(document)
    gone = "raycluster/short was deleted"
    with meanwhile(lambda: real.delete(ref)) as lines, pytest.raises(WaitFailed, match=gone):
        wait(real, ref, check_for(ref), LIMIT_S, lines)


def test_deletion_waits_for_finalizers_and_names_them(real):
    document = ray_cluster("held", real.namespace)
    document["metadata"]["finalizers"] = ["ray.io/gcs-ft-redis-cleanup-finalizer"]
    ref = Ref.of(document, "")
    real.apply(document)
    real.delete(ref)
    with pytest.raises(WaitTimeout, match="still there, held by ray.io/gcs-ft-redis-cleanup-finalizer"):
        wait_deleted(real, ref, 0.5)
    document["metadata"]["finalizers"] = []
    with meanwhile(lambda: real.apply(document, force=True)) as lines:
        wait_deleted(real, ref, LIMIT_S, lines)
    assert real.get(ref) is None


# A watch that is lost

POD = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "default"}, "spec": {}}
POD_REF = Ref("v1", "Pod", "default", "p")


def pod(phase: str, ready: bool = False) -> dict:
    return POD | {"status": {"phase": phase, "conditions": [true("Ready") if ready else false("Ready")]}}


def requests(core: CoreApi, *, watch: bool) -> list[str]:
    return [line for line in core.requests if "/pods?" in line and ("watch=true" in line) == watch]


def test_a_connection_that_is_cut_goes_on_from_the_last_version(core, played):
    core.put(pod("Pending"))
    core.cut_watch_after = 1
    with meanwhile(lambda: core.put(pod("Running")), lambda: core.put(pod("Running", ready=True))) as lines:
        wait(played, POD_REF, check_for(POD_REF), LIMIT_S, lines)
    assert lines[0] == "pending" and lines[-1] == "ready"
    assert any("running; watch pod/p: " in line and "goes on waiting" in line for line in lines)
    assert len(requests(core, watch=False)) == 1 and len(requests(core, watch=True)) == 2


def test_a_version_that_has_expired_is_listed_again(core, played):
    core.put(pod("Pending"))
    played.list_objects(POD_REF)
    fail = core.fail  # The first watch is answered with 410 as a status, the next with an event.
    fail("GET", "watch=true", 410, "too old resource version", reason="Expired")

    def forget() -> None:
        until(lambda: len(requests(core, watch=False)) == 3)  # the first list is ours
        core.forget()
        until(lambda: len(requests(core, watch=False)) == 4)
        core.put(pod("Running", ready=True))

    with meanwhile(forget) as lines:
        wait(played, POD_REF, check_for(POD_REF), LIMIT_S, lines, tick_s=1.0)


def test_a_server_that_is_away_for_a_while_is_waited_for(core, played):
    core.put(pod("Pending"))
    core.fail("GET", "watch=true", 503, "starting", times=3)
    core.drop("GET", "watch=true", times=2)
    with meanwhile(lambda: core.put(pod("Running", ready=True))) as lines:
        wait(played, POD_REF, check_for(POD_REF), LIMIT_S, lines)
    assert len([line for line in lines if "goes on waiting" in line]) >= 4


def test_a_silent_connection_is_given_up(core, tmp_path):
    """As when a firewall forgot it: no answer, no end."""
    patience = Patience(attempts=2, connect_s=0.3, answer_s=30.0, first_pause_s=0.05)
    cluster = connect(core.kubeconfig(tmp_path / "kubeconfig"), patience=patience)
    core.put(pod("Pending"))
    core.hang("GET", "watch=true", seconds=NEVER_S)
    with meanwhile(lambda: core.put(pod("Running", ready=True))) as lines:
        wait(cluster, POD_REF, check_for(POD_REF), LIMIT_S, lines, tick_s=1.0)


def test_rights_that_are_missing_end_the_wait(core, played):
    core.put(pod("Pending"))
    core.fail("GET", "watch=true", 403, 'pods is forbidden: User "me" cannot watch')
    with pytest.raises(ApiError, match=r"watch pod/p: not allowed \(403\)"):
        wait(played, POD_REF, check_for(POD_REF), LIMIT_S)


def test_the_limit_holds(core, played):
    core.put(pod("Pending"))
    with pytest.raises(WaitTimeout, match="pod/p after 1 s: pending"):
        wait(played, POD_REF, check_for(POD_REF), 1.0, tick_s=NEVER_S)
    (asked,) = requests(core, watch=True)
    assert "timeoutSeconds=1" in asked.split("&")


# Core kinds


@pytest.mark.parametrize(
    ("kind", "status", "state", "line"),
    [
        ("pod", {"phase": "Failed", "reason": "Evicted", "message": "disk"}, "failed", "failed (Evicted: disk)"),
        ("pod", {"phase": "Succeeded"}, "done", "succeeded"),
        ("job", {"active": 1, "failed": 2}, "waiting", "1 pods active, 2 failed"),
        ("job", {"conditions": [true("Complete")]}, "done", "succeeded"),
        ("job", {"conditions": [true("Failed", reason="BackoffLimit")]}, "failed", "failed (BackoffLimit)"),
        ("pvc", {"phase": "Pending"}, "waiting", "pending"),
        ("pvc", {"phase": "Bound"}, "done", "bound"),
        ("pvc", {"phase": "Lost"}, "failed", "lost"),
        ("deployment", {"availableReplicas": 1, "updatedReplicas": 2}, "waiting", "1 of 2 replicas available"),
        ("deployment", {"availableReplicas": 2, "updatedReplicas": 2}, "done", "2 of 2 replicas available"),
        ("statefulset", {"availableReplicas": 2, "updatedReplicas": 1}, "waiting", "2 of 2 replicas available"),
        (
            "deployment",
            {"conditions": [false("Progressing", reason="ProgressDeadlineExceeded")]},
            "failed",
            "makes no progress, 0 of 2 replicas available",
        ),
        ("namespace", {"phase": "Terminating"}, "waiting", "terminating"),
        ("configmap", {}, "done", "exists"),
    ],
)
def test_core_kinds(kind, status, state, line):
    ref = Ref.parse(f"{kind}/x", "default")
    verdict = check_for(ref)({"kind": ref.kind, "metadata": {"name": "x"}, "spec": {"replicas": 2}, "status": status})
    assert (verdict.state, verdict.line) == (state, line)
