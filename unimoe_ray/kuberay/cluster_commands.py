"""``unimoe k8s apply | status | logs | wait | delete``: results on stdout, progress and reasons on stderr."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime

from rich.console import Console

from unimoe_ray.errors import UnimoeError, UsageError
from unimoe_ray.kuberay import apply as applying
from unimoe_ray.kuberay import logs as pod_logs
from unimoe_ray.kuberay.client import Cluster, connect
from unimoe_ray.kuberay.conditions import check_for
from unimoe_ray.kuberay.documents import KINDS, Document, Ref, read
from unimoe_ray.kuberay.errors import ApiError
from unimoe_ray.kuberay.explain import Finding, explain
from unimoe_ray.kuberay.observe import containers, observe, pods_of, role
from unimoe_ray.kuberay.progress import Progress
from unimoe_ray.kuberay.wait import wait as wait_for
from unimoe_ray.kuberay.wait import wait_deleted

RAY_KINDS = ("raycluster", "rayjob", "rayservice")


def apply(arguments: argparse.Namespace) -> int:
    """A line per object; with ``--diff`` what changes in it; with ``--dry-run`` nothing is written."""
    cluster = cluster_of(arguments)
    documents = documents_of(arguments.source, arguments.namespace)
    show_changes(cluster, documents, arguments.diff, arguments.dry_run, arguments.force_conflicts)
    return 0


def show_changes(
    cluster: Cluster, documents: list[Document], diff: bool = False, dry_run: bool = False, force: bool = False
) -> None:
    """Apply, and print each change as it is made."""
    changes: Iterable[applying.Change] = (
        applying.plan(cluster, documents, force) if dry_run else applying.apply(cluster, documents, force)
    )
    for change in changes:
        print(cluster.redactor.text(f"{change}{' (dry run)' if dry_run else ''}"), flush=True)
        if diff and change.action == "configured" and (text := applying.difference(change, cluster.redactor)):
            print(text, flush=True)


def delete(arguments: argparse.Namespace) -> int:
    """Of a folder, file or stdin all that it names; or one object."""
    cluster = cluster_of(arguments)
    if _names_object(arguments.source):
        refs = [Ref.parse(arguments.source, cluster.namespace)]
        _existing(cluster, refs[0])
    else:
        documents = documents_of(arguments.source, arguments.namespace)
        refs = [Ref.of(document, cluster.namespace) for document in documents]
    for removal in applying.delete(cluster, refs, arguments.with_data):
        print(removal, flush=True)
        if arguments.wait and removal.action == "deleted":
            _wait_deleted(cluster, removal.ref, arguments.timeout)
    return 0


def _wait_deleted(cluster: Cluster, ref: Ref, limit_s: float) -> None:
    with Progress(Console(stderr=True), str(ref)) as progress:
        wait_deleted(cluster, ref, limit_s, lambda line, _: progress.show(line))


def wait(arguments: argparse.Namespace) -> int:
    """Until an object is ready, has a condition, or is gone; else the reasons, and exit code 1."""
    cluster = cluster_of(arguments)
    ref = Ref.parse(arguments.object, cluster.namespace)
    if arguments.goal == "delete":
        _wait_deleted(cluster, ref, arguments.timeout)
        print(f"{ref} is gone")
        return 0
    check = check_for(ref, arguments.goal)
    document = wait_explained(cluster, ref, lambda report: wait_for(cluster, ref, check, arguments.timeout, report))
    print(f"{ref} {cluster.redactor.text(check(document).line)}")
    return 0


def wait_explained(cluster: Cluster, ref: Ref, waiting: Callable[[Callable], Document]) -> Document:
    """Run a wait with its progress on stderr, and with the reasons there when it fails."""
    with Progress(Console(stderr=True), str(ref)) as progress:
        last: list[Document] = []

        def report(line: str, document: Document | None) -> None:
            if document is not None:
                last[:] = [document]
            progress.show(line, lambda: _reasons(cluster, document))

        try:
            return waiting(report)
        except UnimoeError:
            for finding in _reasons(cluster, last[0] if last else None):
                progress.print(str(finding))
            raise


def _reasons(cluster: Cluster, document: Document | None) -> list[Finding]:
    """Best effort: without the right to read pods or events (or while the server is away), less is known."""
    if document is None:
        return []
    try:
        return explain(observe(cluster, document))
    except UnimoeError:
        return []


def logs(arguments: argparse.Namespace) -> int:
    """Of a pod; of a job's submitter, which prints the job's output; of a cluster's or service's head."""
    cluster = cluster_of(arguments)
    ref = Ref.parse(arguments.object, cluster.namespace)
    pod = pod_logs.choose_pod(cluster, _existing(cluster, ref), arguments.node)
    container = arguments.container or pod_logs.main_container(pod)
    if arguments.follow:
        pod_logs.follow(cluster, Ref.of(pod, cluster.namespace), container, lambda line: print(line, flush=True))
        return 0
    for line in cluster.logs(Ref.of(pod, cluster.namespace), container, arguments.tail, arguments.previous):
        print(line)
    return 0


def status(arguments: argparse.Namespace) -> int:
    """Ray resources with their pods, and what is wrong with each, in words."""
    cluster = cluster_of(arguments)
    if arguments.object:
        ref = Ref.parse(arguments.object, cluster.namespace)
        documents = [_existing(cluster, ref)]
    else:
        listed = [d for kind in RAY_KINDS for d in cluster.list_objects(Ref(*KINDS[kind], cluster.namespace))[0]]
        documents = [document for document in listed if not _belongs_to_another(document)]
    if not documents:
        print(f"no RayCluster, RayJob or RayService in namespace {cluster.namespace}")
    for document in documents:
        _print_status(cluster, document)
    return 0


def _belongs_to_another(document: Document) -> bool:
    """The cluster of a job or service is shown with that."""
    owners = document["metadata"].get("ownerReferences") or []
    return any(owner["kind"] in ("RayJob", "RayService") for owner in owners)


def _print_status(cluster: Cluster, document: Document) -> None:
    ref = Ref.of(document, cluster.namespace)
    line = check_for(ref)(document).line
    print(cluster.redactor.text(f"{ref}  {line}  {_age(document)}"))
    try:
        pods = [] if document["kind"] == "Pod" else pods_of(cluster, document)
        findings = explain(observe(cluster, document))
    except ApiError as error:
        print(f"  its pods and events are not known: {error}")
        return
    for pod in pods:
        name, phase = pod["metadata"]["name"], (pod.get("status") or {}).get("phase", "Pending")
        ready = [entry.get("ready", False) for entry in (pod.get("status") or {}).get("containerStatuses") or []]
        restarts = sum(entry.get("restartCount", 0) for entry in containers(pod))
        facts = [role(pod), phase, f"{sum(ready)}/{len(pod['spec']['containers'])} ready"]
        facts += [f"{restarts} restart{'' if restarts == 1 else 's'}"] if restarts else []
        facts += [pod["spec"]["nodeName"]] if pod["spec"].get("nodeName") else []
        print(f"  pod/{name}  {', '.join(facts)}")
    for finding in findings:
        print("  ! " + cluster.redactor.text(str(finding)).replace("\n", "\n  "))


def _age(document: Document) -> str:
    created = document["metadata"].get("creationTimestamp")
    if not created:
        return ""
    seconds = int((datetime.now(UTC) - datetime.fromisoformat(created)).total_seconds())
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit} old"
    return f"{seconds} s old"


def _existing(cluster: Cluster, ref: Ref) -> Document:
    document = cluster.get(ref)
    if document is None:
        raise UnimoeError(f"{ref} not found in namespace {ref.namespace}")
    return document


def cluster_of(arguments: argparse.Namespace) -> Cluster:
    """The one that the options name; what is tried again is told on stderr."""

    def say(line: str) -> None:
        print(f"unimoe: {line}", file=sys.stderr, flush=True)

    return connect(arguments.kubeconfig, arguments.context, arguments.namespace, say)


def _names_object(source: str) -> bool:
    """``rayjob/x`` rather than a path."""
    kind, slash, name = source.partition("/")
    return (
        bool(slash and name) and "/" not in name and (kind.lower() in KINDS or kind.lower().removesuffix("s") in KINDS)
    )


def documents_of(source: str, namespace: str | None) -> list[Document]:
    """Those of a folder, file or stdin. Raises UsageError where one states another namespace than ``--namespace``."""
    documents = read(source)
    for document in documents:
        stated = document["metadata"].get("namespace")
        if namespace and stated and stated != namespace:
            ref = Ref.of(document, namespace)
            raise UsageError(f"--namespace {namespace}: {ref} of {source} states the namespace {stated!r}")
    return documents
