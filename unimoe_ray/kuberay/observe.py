"""All that tells why a Ray resource is not ready: its clusters, pods, events, claims and last log lines."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from unimoe_ray.kuberay.client import Cluster
from unimoe_ray.kuberay.documents import QUEUE, Document, Ref
from unimoe_ray.kuberay.errors import ApiError

LOG_LINES = 5
WAIT_FOR_HEAD = "wait-gcs-ready"  # KubeRay's first container of a worker


@dataclass(frozen=True)
class Snapshot:
    """events: the latest of each reason per object, oldest first. logs: last lines by pod and container.

    workloads: of Kueue, if it manages the subject.
    """

    subject: Document
    clusters: list[Document] = field(default_factory=list)
    pods: list[Document] = field(default_factory=list)
    events: list[Document] = field(default_factory=list)
    claims: list[Document] = field(default_factory=list)
    logs: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    workloads: list[Document] = field(default_factory=list)

    def events_of(self, kind: str, name: str) -> list[Document]:
        return [
            e for e in self.events if (e["involvedObject"].get("kind"), e["involvedObject"].get("name")) == (kind, name)
        ]


def observe(cluster: Cluster, document: Document) -> Snapshot:
    """``document``: a RayCluster, RayJob, RayService, Pod or anything else that has events."""
    ref = Ref.of(document, cluster.namespace)
    clusters = [found for name in cluster_names(document) if (found := cluster.get(ref.other("raycluster", name)))]
    if document["kind"] == "RayCluster":
        clusters = [document]
    pods = [document] if document["kind"] == "Pod" else pods_of(cluster, document)
    claims = [
        found
        for name in sorted({name for pod in pods for name in _claim_names(pod)})
        if (found := cluster.get(ref.other("pvc", name)))
    ]
    concerned = {(d["kind"], d["metadata"]["name"]) for d in (document, *clusters, *pods, *claims)}
    if document["kind"] == "RayJob":
        concerned.add(("Job", ref.name))
    events = _latest(cluster.list_objects(Ref("v1", "Event", ref.namespace))[0], concerned)
    logs = {(p, c): lines for pod in pods for p, c, lines in _crash_logs(cluster, pod)}
    return Snapshot(document, clusters, pods, events, claims, logs, _workloads(cluster, document))


def cluster_names(document: Document) -> list[str]:
    """Names of the RayClusters behind a Ray resource, the active one of a service first."""
    status = document.get("status") or {}
    if document["kind"] == "RayCluster":
        return [document["metadata"]["name"]]
    if document["kind"] == "RayService":
        found = [
            (status.get(part) or {}).get("rayClusterName") for part in ("activeServiceStatus", "pendingServiceStatus")
        ]
        return list(dict.fromkeys(filter(None, found)))
    return [name for name in [status.get("rayClusterName")] if name]


def pods_of(cluster: Cluster, document: Document) -> list[Document]:
    """Head, worker and submitter pods of a Ray resource, in that order."""
    ref = Ref.of(document, cluster.namespace).other("pod")
    pods: list[Document] = []
    if names := cluster_names(document):
        pods += cluster.list_objects(ref, labels=f"ray.io/cluster in ({','.join(names)})")[0]
    if document["kind"] == "RayJob":
        of_job = f"ray.io/originated-from-crd=RayJob,ray.io/originated-from-cr-name={document['metadata']['name']}"
        pods += cluster.list_objects(ref, labels=of_job)[0]
    if document["kind"] == "Job":
        pods += cluster.list_objects(ref, labels=f"job-name={document['metadata']['name']}")[0]
    order = {"head": 0, "worker": 1, "submitter": 2}
    unique = {pod["metadata"]["name"]: pod for pod in pods}
    return sorted(unique.values(), key=lambda pod: (order[role(pod)], pod["metadata"]["name"]))


def role(pod: Document) -> str:
    """head, worker or submitter."""
    return {"head": "head", "worker": "worker"}.get(labels(pod).get("ray.io/node-type", ""), "submitter")


def labels(document: Document) -> dict[str, str]:
    return document["metadata"].get("labels") or {}


def containers(pod: Document) -> list[dict[str, Any]]:
    """Statuses of all containers, those that run before the others first."""
    status = pod.get("status") or {}
    return [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]


def running(container: dict[str, Any]) -> bool:
    return "running" in (container.get("state") or {})


def crash(container: dict[str, Any]) -> dict[str, Any] | None:
    """How a container last ended, if badly: ``{exitCode, reason, ...}``."""
    if container.get("ready") and running(container):
        return None  # It has recovered.
    for state in (container.get("state") or {}, container.get("lastState") or {}):
        ended = state.get("terminated")
        if ended and ended.get("exitCode", 0) != 0:
            return ended
    return None


def _crash_logs(cluster: Cluster, pod: Document) -> list[tuple[str, str, list[str]]]:
    """(pod, container, last lines) of containers that crashed, and of those that wait for the head."""
    ref, found = Ref.of(pod, cluster.namespace), []
    for container in containers(pod):
        ended_now = (container.get("state") or {}).get("terminated")
        waits = container["name"] == WAIT_FOR_HEAD and running(container)
        if crash(container) is None and not waits:
            continue
        try:
            lines = cluster.logs(ref, container["name"], LOG_LINES, previous=not ended_now and not waits)
        except ApiError as error:  # The node or the log is gone; the rest can still be explained.
            if error.status not in (400, 404, 500):
                raise
            continue
        found.append((ref.name, container["name"], lines))
    return found


def _workloads(cluster: Cluster, document: Document) -> list[Document]:
    if QUEUE not in labels(document):
        return []
    for version in ("v1beta2", "v1beta1"):
        ref = Ref(f"kueue.x-k8s.io/{version}", "Workload", Ref.of(document, cluster.namespace).namespace)
        try:
            return cluster.list_objects(ref, labels=f"kueue.x-k8s.io/job-uid={document['metadata']['uid']}")[0]
        except ApiError as error:
            if error.status not in (403, 404):  # Without Kueue, or the right to read its objects, we know less.
                raise
    return []


def _claim_names(pod: Document) -> list[str]:
    volumes = pod.get("spec", {}).get("volumes") or []
    return [volume["persistentVolumeClaim"]["claimName"] for volume in volumes if "persistentVolumeClaim" in volume]


def event_time(event: Document) -> str:
    series = event.get("series") or {}
    return (
        series.get("lastObservedTime")
        or event.get("lastTimestamp")
        or event.get("eventTime")
        or event["metadata"].get("creationTimestamp")
        or ""
    )


def _latest(events: list[Document], concerned: set[tuple[str, str]]) -> list[Document]:
    newest: dict[tuple[str, str, str], Document] = {}
    for event in sorted(events, key=event_time):
        about = event.get("involvedObject") or {}
        key = (about.get("kind", ""), about.get("name", ""), event.get("reason", ""))
        if key[:2] in concerned:
            newest[key] = event
    return sorted(newest.values(), key=event_time)
