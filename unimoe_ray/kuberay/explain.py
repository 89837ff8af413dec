"""Why a Ray resource is not ready, in words: from its status, pods, events, claims and last log lines.

Pure functions of a ``Snapshot``. A pod's own status counts before events, which may be an hour old.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from unimoe_ray.kuberay.conditions import check_for, condition, is_true
from unimoe_ray.kuberay.documents import HELD, QUEUE, Document, Ref
from unimoe_ray.kuberay.observe import (
    WAIT_FOR_HEAD,
    Snapshot,
    containers,
    crash,
    event_time,
    labels,
    role,
    running,
)
from unimoe_ray.kuberay.refusals import in_words
from unimoe_ray.kuberay.scheduling import unschedulable

# An operator answers within a second or two.
NO_OPERATOR_AFTER_S = 30.0
# What still fails is tried, and said, again and again.
STALE_AFTER_S = 900.0


@dataclass(frozen=True)
class Finding:
    """what: the object, such as pod/x; lines: of its log, last ones."""

    what: str
    problem: str
    lines: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([f"{self.what}: {self.problem}", *(f"    | {line}" for line in self.lines)])


def explain(snapshot: Snapshot, now: datetime | None = None) -> list[Finding]:
    """What is wrong, the cause before its consequences; empty if nothing is known to be.

    Equal findings of several pods become one. ``now``: for tests.
    """
    now = now or datetime.now(UTC)
    findings = [
        *_subject(snapshot, now),
        *(found for name, owner in _owners(snapshot) for found in _warnings(snapshot, name, owner, now)),
        *(found for claim in snapshot.claims for found in _claim(snapshot, claim)),
        *(found for pod in snapshot.pods for found in _pod(snapshot, pod)),
    ]
    return _merged(findings)


def _merged(findings: list[Finding]) -> list[Finding]:
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for found in findings:
        names = groups.setdefault((found.problem, found.lines), [])
        if found.what not in names:
            names.append(found.what)
    return [
        Finding(names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else ""), problem, lines)
        for (problem, lines), names in groups.items()
    ]


def _name(document: Document) -> str:
    return str(Ref.of(document, ""))


def _owners(snapshot: Snapshot) -> Iterator[tuple[str, Document]]:
    """The subject and its clusters, with those that are as they should be left out."""
    for document in {_name(d): d for d in (snapshot.subject, *snapshot.clusters)}.values():
        if _is_ray(document) and check_for(Ref.of(document, ""))(document).state != "done":
            yield _name(document), document


# Ray's own resources


def _subject(snapshot: Snapshot, now: datetime) -> Iterator[Finding]:
    document = snapshot.subject
    name, status = _name(document), document.get("status") or {}
    if queue := _waits_for_queue(document):
        yield Finding(name, f"waits for admission by the queue {queue!r}{_queue_reason(snapshot)}")
    elif (
        not status
        and not snapshot.events
        and _since(document["metadata"].get("creationTimestamp"), now) > NO_OPERATOR_AFTER_S
        and _is_ray(document)
    ):
        yield Finding(name, "no operator has taken it up: is KubeRay installed, and does it watch this namespace?")
    if document["kind"] == "RayJob" and status.get("jobDeploymentStatus") in ("Failed", "ValidationFailed"):
        lines = [line for line in (status.get("message") or "").splitlines() if line.strip()]
        reason = status.get("reason") or "no reason given"
        yield Finding(name, _JOB_REASONS.get(reason, f"failed ({reason})"), tuple(lines[-5:]))
    if document["kind"] == "RayService":
        yield from _applications(name, status)


_JOB_REASONS = {
    "AppFailed": "the program ended with an error",
    "DeadlineExceeded": "it ran longer than activeDeadlineSeconds allows",
    "PreRunningDeadlineExceeded": "it did not run within preRunningDeadlineSeconds",
    "SubmissionFailed": "it could not be submitted to its cluster",
    "ValidationFailed": "the operator refuses the specification",
    "JobStatusCheckTimeoutExceeded": "its head did not answer for too long",
    "JobDeploymentStatusTransitionGracePeriodExceeded": "the job had ended, but its submitter did not notice in time",
}


def _is_ray(document: Document) -> bool:
    return document["apiVersion"].startswith("ray.io/")


def _waits_for_queue(document: Document) -> str:
    queue = labels(document).get(QUEUE, "") if document.get("spec", {}).get("suspend") else ""
    return "" if queue.endswith(HELD) else queue  # Nobody has started it yet.


def _queue_reason(snapshot: Snapshot) -> str:
    for workload in snapshot.workloads:
        reserved = condition(workload.get("status") or {}, "QuotaReserved")
        if reserved.get("status") == "False" and reserved.get("message"):
            return f": {reserved['message']}"
    return ""


def _since(time: str | None, now: datetime) -> float:
    """Seconds; 0 for a time that is not stated."""
    return (now - datetime.fromisoformat(time)).total_seconds() if time else 0.0


def _applications(name: str, status: dict[str, Any]) -> Iterator[Finding]:
    """Serve applications and deployments that Serve itself calls failed or unhealthy."""
    for part in ("activeServiceStatus", "pendingServiceStatus"):
        for title, application in ((status.get(part) or {}).get("applicationStatuses") or {}).items():
            broken = {
                f"deployment {deployment!r}": state
                for deployment, state in (application.get("serveDeploymentStatuses") or {}).items()
                if state.get("status") in ("UNHEALTHY", "DEPLOY_FAILED")
            }
            if not broken and application.get("status") in ("DEPLOY_FAILED", "UNHEALTHY"):
                broken = {"": application}
            for where, state in broken.items():
                lines = [line for line in (state.get("message") or "").splitlines() if line.strip()]
                what = f"application {title!r}" + (f", {where}" if where else "")
                words = "could not be deployed" if state["status"] == "DEPLOY_FAILED" else "is unhealthy"
                yield Finding(name, f"{what} {words}", tuple(lines[-5:]))


def _warnings(snapshot: Snapshot, name: str, owner: Document, now: datetime) -> Iterator[Finding]:
    """What the operator or the API server refused to do for a resource: quota, webhooks, invalid specifications."""
    failure = condition(owner.get("status") or {}, "ReplicaFailure")
    messages = [failure.get("message", "")] if failure.get("status") == "True" else []
    kinds = [owner["kind"], *(["Job"] if owner["kind"] == "RayJob" else [])]
    for event in (e for kind in kinds for e in snapshot.events_of(kind, owner["metadata"]["name"])):
        if event.get("type") == "Warning" and _since(event_time(event), now) < STALE_AFTER_S:
            messages.append(event.get("message", ""))
    for message in messages:
        yield Finding(name, in_words(message) or " ".join(message.split()))


# Claims


def _claim(snapshot: Snapshot, claim: Document) -> Iterator[Finding]:
    name, phase = claim["metadata"]["name"], (claim.get("status") or {}).get("phase")
    what = f"pvc/{name}"
    if phase == "Lost":
        yield Finding(what, "its volume is gone, and the data with it")
    if phase != "Pending":
        return
    for event in reversed(snapshot.events_of("PersistentVolumeClaim", name)):
        message = " ".join(event.get("message", "").split())
        if match := re.search(r'storageclass\S* "(.+?)" not found', message):
            yield Finding(what, f"the storage class {match[1]!r} does not exist in this cluster")
        elif event.get("reason") == "FailedBinding":
            yield Finding(what, f"no volume for it: {message}")
        elif event.get("reason") == "ProvisioningFailed":
            yield Finding(what, f"its volume cannot be made: {in_words(message) or message}")
        else:
            continue
        return


# Pods


def _pod(snapshot: Snapshot, pod: Document) -> Iterator[Finding]:
    name, status = pod["metadata"]["name"], pod.get("status") or {}
    what = f"pod/{name}" + (f" ({role(pod)})" if role(pod) in ("head", "worker") else "")
    if status.get("phase") == "Succeeded" or (is_true(status, "Ready") and not any(map(crash, containers(pod)))):
        return
    if problem := _removed(status):
        yield Finding(what, problem)
        return
    scheduled = condition(status, "PodScheduled")
    if scheduled.get("status") == "False":
        yield Finding(what, _unplaced(snapshot, pod, scheduled))
        return
    problems = [found for container in containers(pod) for found in _container(snapshot, pod, what, container)]
    yield from problems
    if not problems and status.get("phase") in ("Pending", "Running"):
        yield from _stuck(snapshot, pod, what)


def _removed(status: dict[str, Any]) -> str:
    """Evicted, preempted, or on a node that went away."""
    target = condition(status, "DisruptionTarget")
    if status.get("reason") == "Evicted":
        return f"was evicted: {status.get('message', 'no reason given').strip()}"
    if target.get("status") == "True":
        words = {
            "PreemptionByScheduler": "made room for a pod of higher priority",
            "DeletionByTaintManager": "its node failed or was tainted",
            "EvictionByEvictionAPI": "its node is being drained",
            "TerminationByKubelet": "its node shuts down or is short of a resource (a spot node reclaimed?)",
        }.get(target.get("reason", ""), target.get("reason", ""))
        return f"is taken off its node: {words}"
    return ""


def _unplaced(snapshot: Snapshot, pod: Document, scheduled: dict[str, Any]) -> str:
    if scheduled.get("reason") == "SchedulingGated":
        queue = labels(pod).get(QUEUE)
        return f"held back by a scheduling gate{f' of the queue {queue!r}' if queue else ''}"
    words = f"cannot be scheduled: {unschedulable(pod, scheduled.get('message', ''))}"
    for event in reversed(snapshot.events_of("Pod", pod["metadata"]["name"])):
        if event.get("reason") == "TriggeredScaleUp":
            return f"{words}. The cluster autoscaler is adding a node"
        if event.get("reason") == "NotTriggerScaleUp":
            return f"{words}. The cluster autoscaler adds none: {_after_colon(event.get('message', ''))}"
    return words


def _after_colon(message: str) -> str:
    return message.split(": ", 1)[-1].strip()


def _container(snapshot: Snapshot, pod: Document, what: str, container: dict[str, Any]) -> Iterator[Finding]:
    waiting = (container.get("state") or {}).get("waiting") or {}
    reason, message = waiting.get("reason", ""), waiting.get("message", "")
    title = f"container {container['name']!r}"
    lines = tuple(snapshot.logs.get((pod["metadata"]["name"], container["name"]), ()))
    if reason in _IMAGE_REASONS:
        pulls = [
            e.get("message", "") for e in snapshot.events_of("Pod", pod["metadata"]["name"]) if e["reason"] == "Failed"
        ]
        yield Finding(what, _image(container.get("image", "?"), reason, " ".join([message, *pulls])))
    elif reason in ("CreateContainerConfigError", "CreateContainerError", "RunContainerError"):
        yield Finding(what, f"{title} cannot be started: {_config(message)}")
    elif ended := crash(container):
        yield Finding(what, f"{title} {_ended(pod, container, ended)}{_hint(lines)}", lines)
    elif container["name"] == WAIT_FOR_HEAD and running(container) and _head_ready(snapshot):
        yield Finding(
            what,
            "cannot reach the head's GCS although the head is ready: a NetworkPolicy, DNS or a differing "
            f"authentication token may be in the way{_hint(lines)}",
            lines,
        )


_IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
_IMAGE_CAUSES = {
    r"insufficient_scope|unauthori[sz]ed|authentication required|access denied|denied:|40[13] ": (
        "the registry refuses these credentials, or has no such repository: name a pull secret (imagePullSecrets)"
    ),
    r"toomanyrequests|rate limit|429": "the registry's rate limit is reached: pull with credentials, or later",
    r"no match for platform|exec format": "it is not built for the architecture of the node",
    r"not found|manifest unknown": "the registry has no such image or tag",
    r"no such host|timeout|timed out|connection refused|certificate|deadline exceeded": (
        "the node cannot reach the registry"
    ),
    r"no space left": "the disk of the node is full",
}


def _image(image: str, reason: str, text: str) -> str:
    if reason == "InvalidImageName":
        return f"the image name {image!r} is not valid"
    if reason == "ErrImageNeverPull":
        return f"the image {image!r} is not on the node, and imagePullPolicy is Never"
    cause = _first_match(_IMAGE_CAUSES, text) or text.strip() or reason
    return f"the image {image!r} cannot be pulled: {cause}"


def _config(message: str) -> str:
    if match := re.search(r'(secret|configmap) "(.+?)" not found', message):
        return f"the {match[1]} {match[2]!r} does not exist in the namespace"
    if match := re.search(r"couldn't find key (\S+) in (Secret|ConfigMap) (?:\S+/)?(\S+)", message):
        return f"the {match[2].lower()} {match[3]!r} has no key {match[1]!r}"
    return " ".join(message.split())


def _ended(pod: Document, container: dict[str, Any], ended: dict[str, Any]) -> str:
    restarts = container.get("restartCount", 0)
    again = f" ({restarts} restart{'' if restarts == 1 else 's'})" if restarts else ""
    if ended.get("reason") == "OOMKilled":
        spec = pod.get("spec", {})
        everyone = [*(spec.get("initContainers") or []), *(spec.get("containers") or [])]
        limits = [(c.get("resources") or {}).get("limits") or {} for c in everyone if c["name"] == container["name"]]
        limit = limits[0].get("memory", "none") if limits else "none"
        return f"was killed: out of memory, its limit is {limit}{again}; `unimoe k8s size` shows what it needs"
    code = ended.get("exitCode")
    words = {137: "was killed (SIGKILL)", 139: "crashed (segmentation fault)", 143: "was ended (SIGTERM)"}
    return words.get(code, f"crashed with exit code {code}") + again


_HINTS = {
    r"redis.*(?:refused|timed? ?out|unable|failed|error|unreachable)|(?:refused|failed|unable).*redis": (
        "the Redis that keeps the head's state cannot be used"
    ),
    r"InvalidAuthToken|Unauthenticated|WRONGPASS|NOAUTH": "the authentication tokens differ",
    r"No space left on device": "its disk is full",
    r"CUDA out of memory|OutOfMemoryError": "the GPU's memory is full",
    r"Read-only file system": "it writes where its file system is read-only",
    r"ModuleNotFoundError|ImportError": "the image lacks a Python package",
    r"Version mismatch": "client and cluster run different versions of Ray or Python",
}


def _hint(lines: tuple[str, ...]) -> str:
    """The meaning of the last log line that is known."""
    found = filter(None, (_first_match(_HINTS, line) for line in reversed(lines)))
    return next((f": {words}" for words in found), "")


def _first_match(table: dict[str, str], text: str) -> str:
    return next((words for pattern, words in table.items() if re.search(pattern, text, re.IGNORECASE)), "")


def _head_ready(snapshot: Snapshot) -> bool:
    return any(role(pod) == "head" and is_true(pod.get("status") or {}, "Ready") for pod in snapshot.pods)


def _stuck(snapshot: Snapshot, pod: Document, what: str) -> Iterator[Finding]:
    """A pod whose containers say nothing: volumes that cannot be mounted, networks, probes."""
    for event in reversed(snapshot.events_of("Pod", pod["metadata"]["name"])):
        reason, message = event.get("reason", ""), " ".join(event.get("message", "").split())
        if reason == "FailedMount":
            yield Finding(what, f"a volume cannot be mounted: {_config(message)}")
        elif reason == "FailedAttachVolume":
            shared = "Multi-Attach" in message
            yield Finding(what, "its volume is in use on another node (ReadWriteOnce)" if shared else message)
        elif reason == "FailedCreatePodSandBox":
            yield Finding(what, f"the node cannot set up its network: {message}")
        elif reason == "Unhealthy":
            yield Finding(what, f"does not answer its probe: {message}")
        else:
            continue
        return
