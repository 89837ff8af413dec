"""Pod logs: of one container now, or followed over lost connections until it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable

from unimoe_ray.errors import UnimoeError, UsageError
from unimoe_ray.kuberay.client import Cluster
from unimoe_ray.kuberay.documents import Document, Ref
from unimoe_ray.kuberay.errors import ApiError, Unreachable
from unimoe_ray.kuberay.observe import pods_of, role

SILENCE_S = 60.0
PAUSE_S = 2.0


def choose_pod(cluster: Cluster, document: Document, node: str | None = None) -> Document:
    """The pod whose log tells most: a job's submitter (it prints the job's own output), else the head.

    node: head, worker or submitter, or a part of a pod's name. Raises UnimoeError if there is none yet.
    """
    if document["kind"] == "Pod":
        return document
    pods = pods_of(cluster, document)
    where = f"{document['kind'].lower()}/{document['metadata']['name']}"
    if not pods:
        raise UnimoeError(f"{where} has no pods (yet)")
    if node is None:
        return next((pod for pod in reversed(pods) if role(pod) == "submitter"), pods[0])
    chosen = [pod for pod in pods if node in (role(pod),) or node in pod["metadata"]["name"]]
    if not chosen:
        names = ", ".join(pod["metadata"]["name"] for pod in pods)
        raise UsageError(f"--node {node}: no such pod of {where}; allowed: head, worker, submitter, or one of {names}")
    return chosen[-1] if node == "submitter" else chosen[0]


def main_container(pod: Document) -> str:
    return pod["spec"]["containers"][0]["name"]


def follow(
    cluster: Cluster,
    pod: Ref,
    container: str,
    write: Callable[[str], None],
    stop: threading.Event | None = None,
    silence_s: float = SILENCE_S,
) -> None:
    """Write a container's log, each line once, to its end after that of the container (or until ``stop`` is set).

    A connection that is lost, or silent for ``silence_s`` seconds, is opened again from the last line seen.
    """
    stop = stop or threading.Event()
    last, ended = "", False
    while not stop.is_set():
        whole = False
        try:
            for stamp, line in cluster.follow(pod, container, last, silence_s):
                if stamp > last:  # The server's sinceTime counts whole seconds only.
                    write(line)
                    last = stamp
                if stop.is_set():
                    return
            whole = True
        except Unreachable:
            pass
        except ApiError as error:
            passes = error.status == 429 or error.status >= 500
            # 400: the container has not started yet. Of one that has ended there is no (more) log.
            if not (passes or ended or error.status == 400):
                raise
            whole = ended and not passes
        ended = _ended(cluster.get(pod), container)
        if ended and whole:
            return
        stop.wait(PAUSE_S)


def _ended(pod: Document | None, container: str) -> bool:
    if pod is None:
        return True
    status = pod.get("status") or {}
    states = {entry["name"]: entry.get("state") or {} for entry in status.get("containerStatuses") or []}
    return status.get("phase") in ("Succeeded", "Failed") or "terminated" in states.get(container, {})
