"""``unimoe k8s submit``: start one of the rendered resources, a stage's job above all, and follow it."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from unimoe_ray.errors import UnimoeError, UsageError
from unimoe_ray.kuberay import logs as pod_logs
from unimoe_ray.kuberay.apply import plan
from unimoe_ray.kuberay.client import Cluster
from unimoe_ray.kuberay.cluster_commands import cluster_of, documents_of, show_changes, wait_explained
from unimoe_ray.kuberay.conditions import check_for, ray_job
from unimoe_ray.kuberay.documents import HELD, QUEUE, Document, Ref
from unimoe_ray.kuberay.observe import labels, pods_of, role
from unimoe_ray.kuberay.wait import wait, wait_deleted

# A log is complete a moment after its job.
LAST_LINES_S = 10.0


def submit(arguments: argparse.Namespace) -> int:
    """Apply what the resource needs, start it, and go on until it is done (a job) or ready (cluster, endpoint).

    A job that has ended is replaced; one that runs is left alone. Its output is printed as it comes.
    """
    cluster = cluster_of(arguments)
    documents = documents_of(arguments.source, arguments.namespace)
    chosen = started(choose(documents, arguments.name, arguments.source))
    ref = Ref.of(chosen, cluster.namespace)
    needed = [document for document in documents if not document["apiVersion"].startswith("ray.io/")]
    plan(cluster, [*needed, chosen])
    _make_room(cluster, ref, arguments.timeout)
    show_changes(cluster, [*needed, chosen], arguments.diff)
    if not arguments.follow:
        print(f"follow it with: unimoe k8s wait {ref} -n {ref.namespace}")
        return 0
    try:
        line = follow(cluster, ref, arguments.timeout)
    except KeyboardInterrupt:
        print(f"unimoe: {ref} goes on; unimoe k8s wait {ref} -n {ref.namespace}", file=sys.stderr)
        raise
    print(f"{ref} {line}")
    return 0


def choose(documents: list[Document], name: str, source: str) -> Document:
    """The Ray resource of that name, of which the end will do, or of that component (endpoint). Raises UsageError."""
    known = {d["metadata"]["name"]: d for d in documents if d["apiVersion"].startswith("ray.io/")}
    found = (
        [d for full, d in known.items() if full == name]
        or [d for full, d in known.items() if full.endswith(f"-{name}")]
        or [d for d in known.values() if labels(d).get("app.kubernetes.io/component") == name]
    )
    if len(found) != 1:
        names = ", ".join(sorted(known))
        raise UsageError(f"{name!r}: {'more than one' if found else 'no'} Ray resource of {source}; allowed: {names}")
    return found[0]


def started(document: Document) -> Document:
    """Not suspended; or, where a queue decides when, moved from the queue that holds to the one that admits."""
    queue = labels(document).get(QUEUE)
    if queue is None:
        return document | {"spec": document["spec"] | {"suspend": False}}
    marks = labels(document) | {QUEUE: queue.removesuffix(HELD)}
    return document | {"metadata": document["metadata"] | {"labels": marks}}


def _make_room(cluster: Cluster, ref: Ref, limit_s: float) -> None:
    """Remove the job if it has ended: it would not run again. Raises UnimoeError if it is running."""
    stored = cluster.get(ref)
    if stored is None or ref.kind != "RayJob":
        return
    verdict = ray_job(stored)
    if verdict.state != "waiting":
        print(f"{ref} {cluster.redactor.text(verdict.line)} before; it is replaced", flush=True)
        cluster.delete(ref)
        wait_deleted(cluster, ref, limit_s)
    elif (stored.get("status") or {}).get("jobDeploymentStatus") not in (None, "", "Suspended"):
        raise UnimoeError(
            f"{ref} is at it already ({verdict.line}): unimoe k8s logs {ref} --follow, or delete it first"
        )


def follow(cluster: Cluster, ref: Ref, limit_s: float) -> str:
    """Wait until it is done or ready, printing a job's output; its last status in words. Raises UnimoeError."""
    check = check_for(ref)
    with _output(cluster) as see:

        def waiting(report: Callable[[str, Document | None], None]) -> Document:
            def both(line: str, document: Document | None) -> None:
                report(line, document)
                see(document)

            return wait(cluster, ref, check, limit_s, both)

        return cluster.redactor.text(check(wait_explained(cluster, ref, waiting)).line)


@contextmanager
def _output(cluster: Cluster) -> Iterator[Callable[[Document | None], None]]:
    """A function that takes a job's latest state, and prints its submitter's log from when there is one."""
    stop = threading.Event()
    threads: dict[str, threading.Thread] = {}

    def see(document: Document | None) -> None:
        if document is None or document["kind"] != "RayJob" or not (document.get("status") or {}).get("jobStatus"):
            return
        for pod in pods_of(cluster, document):
            name = pod["metadata"]["name"]
            leaving = "deletionTimestamp" in pod["metadata"]  # of a job that this one replaces
            if role(pod) == "submitter" and not leaving and name not in threads:
                where = Ref.of(pod, cluster.namespace), pod_logs.main_container(pod)
                threads[name] = threading.Thread(target=_print_log, args=(cluster, *where, stop), daemon=True)
                threads[name].start()

    try:
        yield see
        for thread in threads.values():
            thread.join(LAST_LINES_S)
    finally:
        stop.set()


def _print_log(cluster: Cluster, pod: Ref, container: str, stop: threading.Event) -> None:
    try:
        pod_logs.follow(cluster, pod, container, lambda line: print(line, flush=True), stop)
    except UnimoeError as error:
        print(f"unimoe: {error}", file=sys.stderr, flush=True)
