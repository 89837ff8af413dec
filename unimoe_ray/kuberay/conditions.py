"""When an object is ready, done or lost: what its status says, as a verdict and in words."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from unimoe_ray.errors import UsageError
from unimoe_ray.kuberay.documents import Document, Ref


@dataclass(frozen=True)
class Verdict:
    """state: whether to go on waiting; line: the status in words, for a person."""

    state: Literal["waiting", "done", "failed"]
    line: str


Check = Callable[[Document], Verdict]


def check_for(ref: Ref, goal: str = "ready") -> Check:
    """The check behind ``--for``: ready (of a RayJob or Job: succeeded), running, condition=TYPE[=STATUS].

    Raises UsageError for any other goal. ("delete" needs no check: the object is there or not.)
    """
    if goal == "ready":
        return _READY.get(ref.kind, _exists)
    if goal == "running" and ref.kind == "RayJob":
        return _ray_job_runs
    if match := re.fullmatch(r"condition=(?P<type>[\w./-]+)(?:=(?P<status>\w+))?", goal):
        return lambda document: _has_condition(document, match["type"], match["status"] or "True")
    raise UsageError(f"--for {goal}: allowed: ready, running (of a RayJob), delete, condition=TYPE[=STATUS]")


def condition(status: dict[str, Any], type_: str) -> dict[str, Any]:
    """The condition of that type, or an empty one."""
    return next((entry for entry in status.get("conditions") or [] if entry.get("type") == type_), {})


def is_true(status: dict[str, Any], type_: str) -> bool:
    return condition(status, type_).get("status") == "True"


def observed(document: Document) -> bool:
    """Whether the controller has seen the latest change of the specification; its status is old until then."""
    seen = document.get("status", {}).get("observedGeneration")
    return seen is None or seen >= document["metadata"].get("generation", 0)


def _has_condition(document: Document, type_: str, wanted: str) -> Verdict:
    found = condition(document.get("status") or {}, type_)
    words = f"{type_} is {found.get('status', 'not stated yet')}" + _because(found)
    return Verdict("done" if found.get("status") == wanted and observed(document) else "waiting", words)


def _because(found: dict[str, Any]) -> str:
    why = ": ".join(filter(None, (found.get("reason"), found.get("message"))))
    return f" ({why})" if why else ""


def _exists(document: Document) -> Verdict:
    return Verdict("done", "exists")


def ray_cluster(document: Document) -> Verdict:
    """Ready: the head and all workers that are wanted now run."""
    status = document.get("status") or {}
    if not status:
        return Verdict("waiting", "not taken up by an operator yet")
    if not observed(document):
        return Verdict("waiting", "the operator has not seen the last change yet")
    workers = f"{status.get('readyWorkerReplicas', 0)} of {status.get('desiredWorkerReplicas', 0)} workers ready"
    if is_true(status, "RayClusterSuspended") or status.get("state") == "suspended":
        return Verdict("waiting", "suspended, waits to be started")
    if is_true(status, "ReplicaFailure"):
        failure = condition(status, "ReplicaFailure")
        return Verdict("waiting", f"pods cannot be created ({failure.get('reason', 'no reason given')}), {workers}")
    head = condition(status, "HeadPodReady")
    if head and head.get("status") != "True":
        return Verdict("waiting", f"head {head.get('reason') or 'not ready'}, {workers}")
    if status.get("state") == "ready":
        return Verdict("done", f"ready, {workers}")
    return Verdict("waiting", f"{status.get('state') or 'starting'}, {workers}")


def ray_job(document: Document) -> Verdict:
    """Done: the job has succeeded. Failed: it, its deployment or its validation has."""
    status = document.get("status") or {}
    deployment, job = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
    why = _because({"reason": status.get("reason"), "message": _last_line(status.get("message"))})
    if job == "SUCCEEDED" and deployment in ("Complete", ""):
        return Verdict("done", "succeeded")
    if job == "STOPPED":
        return Verdict("failed", f"was stopped{why}")
    if deployment == "ValidationFailed":
        return Verdict("failed", f"the operator refuses the specification{why}")
    if deployment == "Failed":
        return Verdict("failed", f"failed{why}")
    if deployment == "Complete":
        return Verdict("failed", f"ended as {job or 'unknown'}{why}")
    if deployment == "Retrying":
        return Verdict("waiting", f"failed, is tried again{why}")
    if deployment in ("Suspended", "Suspending"):
        return Verdict("waiting", "suspended, waits to be started")
    if deployment == "Running":
        return Verdict("waiting", f"running ({job or 'job not submitted yet'})")
    if deployment == "Initializing":
        return Verdict("waiting", f"waits for its cluster{_cluster_words(status.get('rayClusterStatus'))}")
    return Verdict("waiting", deployment.lower() or "not taken up by an operator yet")


def _ray_job_runs(document: Document) -> Verdict:
    verdict = ray_job(document)
    running = (document.get("status") or {}).get("jobStatus") == "RUNNING"
    return Verdict("done", verdict.line) if running else verdict


def ray_service(document: Document) -> Verdict:
    """Ready: it has endpoints, and no upgrade is under way."""
    status = document.get("status") or {}
    if not status:
        return Verdict("waiting", "not taken up by an operator yet")
    if not observed(document):
        return Verdict("waiting", "the operator has not seen the last change yet")
    ready = condition(status, "Ready")
    if ready.get("reason") in ("ValidationFailed", "InitializingTimeout"):
        return Verdict("failed", f"cannot start{_because(ready)}")
    if is_true(status, "Suspended"):
        return Verdict("waiting", "suspended, waits to be started")
    endpoints = status.get("numServeEndpoints", 0)
    words = f"{endpoints} endpoint{'' if endpoints == 1 else 's'}"
    if is_true(status, "UpgradeInProgress") or is_true(status, "RollbackInProgress"):
        what = "rolls back" if is_true(status, "RollbackInProgress") else "upgrade under way"
        routed = (status.get("pendingServiceStatus") or {}).get("trafficRoutedPercent")
        share = f", {routed} % of the traffic on the new cluster" if routed is not None else ""
        return Verdict("waiting", f"{what}{share}, {words}")
    if ready.get("status") == "True" or (not ready and status.get("serviceStatus") == "Running" and endpoints):
        return Verdict("done", f"ready, {words}")
    clusters = (status.get("activeServiceStatus") or status.get("pendingServiceStatus") or {}).get("rayClusterStatus")
    return Verdict("waiting", f"{words}{_because({'reason': ready.get('reason')})}{_cluster_words(clusters)}")


def _cluster_words(status: dict[str, Any] | None) -> str:
    return f": {ray_cluster({'metadata': {}, 'status': status}).line}" if status else ""


def _last_line(text: str | None) -> str:
    """A failed job's message is a whole traceback; its last line says what happened."""
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _pod(document: Document) -> Verdict:
    status = document.get("status") or {}
    phase = status.get("phase", "Pending")
    if phase == "Failed":
        return Verdict("failed", f"failed{_because(status)}")
    if phase == "Succeeded" or is_true(status, "Ready"):
        return Verdict("done", "ready" if phase == "Running" else "succeeded")
    return Verdict("waiting", phase.lower())


def _job(document: Document) -> Verdict:
    status = document.get("status") or {}
    if is_true(status, "Failed"):
        return Verdict("failed", f"failed{_because(condition(status, 'Failed'))}")
    if is_true(status, "Complete"):
        return Verdict("done", "succeeded")
    return Verdict("waiting", f"{status.get('active', 0)} pods active, {status.get('failed', 0)} failed")


def _claim(document: Document) -> Verdict:
    phase = (document.get("status") or {}).get("phase", "Pending")
    return Verdict({"Bound": "done", "Lost": "failed"}.get(phase, "waiting"), phase.lower())


def _replicas(document: Document) -> Verdict:
    """Of a Deployment or StatefulSet."""
    status, wanted = document.get("status") or {}, document.get("spec", {}).get("replicas", 1)
    ready, updated = status.get("availableReplicas", 0), status.get("updatedReplicas", 0)
    line = f"{ready} of {wanted} replicas available"
    if condition(status, "Progressing").get("reason") == "ProgressDeadlineExceeded":
        return Verdict("failed", f"makes no progress, {line}")
    return Verdict("done" if min(ready, updated) >= wanted and observed(document) else "waiting", line)


def _namespace(document: Document) -> Verdict:
    phase = (document.get("status") or {}).get("phase", "Active")
    return Verdict("done" if phase == "Active" else "waiting", phase.lower())


_READY: dict[str, Check] = {
    "RayCluster": ray_cluster,
    "RayJob": ray_job,
    "RayService": ray_service,
    "Pod": _pod,
    "Job": _job,
    "Deployment": _replicas,
    "StatefulSet": _replicas,
    "PersistentVolumeClaim": _claim,
    "Namespace": _namespace,
}
