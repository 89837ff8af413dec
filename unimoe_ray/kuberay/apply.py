"""Apply documents to a cluster: all are checked before the first is written, and each change is told."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from unimoe_ray.errors import UsageError
from unimoe_ray.kuberay.client import Cluster
from unimoe_ray.kuberay.documents import HELD, HOLDS_DATA, QUEUE, Document, Ref, in_order, rank
from unimoe_ray.kuberay.errors import ApiError
from unimoe_ray.kuberay.redact import HIDDEN, Redactor, secret_values
from unimoe_ray.kuberay.validate import validate

# A cluster may be without what watches ours: then nothing watches, and all else works.
OPTIONAL_GROUPS = {"monitoring.coreos.com": "the Prometheus operator"}


@dataclass(frozen=True)
class Change:
    """What applying a document does. before, after: the stored object; after is None where it could not be foreseen."""

    ref: Ref
    action: Literal["created", "configured", "unchanged", "skipped"]
    before: Document | None = None
    after: Document | None = None
    note: str = ""

    def __str__(self) -> str:
        return f"{self.ref} {self.action}" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class Removal:
    """What became of an object that was to be deleted."""

    ref: Ref
    action: Literal["deleted", "kept", "absent"]

    def __str__(self) -> str:
        words = {"kept": "kept (it holds what runs have written; --with-data deletes it)", "absent": "not there"}
        return f"{self.ref} {words.get(self.action, self.action)}"


def check(documents: list[Document], redactor: Redactor, stored: Document | None = None) -> None:
    """Our own validation, before the server is asked. Raises UsageError naming each field that is wrong, and why.

    stored: of a single document, the object that it would change.
    """
    problems = []
    for document in documents:
        redactor.learn_document(document)
        problems += [f"{Ref.of(document, '')}: {problem}" for problem in validate(document, stored)]
    if problems:
        raise UsageError(redactor.text("; ".join(problems)))


def plan(cluster: Cluster, documents: list[Document], force: bool = False) -> list[Change]:
    """What applying them would change, in the order of applying; nothing is written.

    The server judges every document (a dry run), except those in a namespace that is yet to be made. Raises
    UsageError for a document that we refuse, ApiError for one that the server refuses.
    """
    check(documents, cluster.redactor)
    ordered = in_order(documents)
    refs = [Ref.of(document, cluster.namespace) for document in ordered]
    if twice := sorted({str(ref) for ref in refs if refs.count(ref) > 1}):
        raise UsageError(f"given twice: {', '.join(twice)}")
    skipped = {ref: missing for ref in refs if (missing := _missing_extension(cluster, ref))}
    made_here = {ref.name for ref in refs if ref.kind == "Namespace" and cluster.get(ref) is None}
    changes = []
    for ref, document in zip(refs, ordered, strict=True):
        if ref in skipped:
            changes.append(Change(ref, "skipped", note=f"the cluster is without {skipped[ref]}"))
        elif ref.namespace in made_here and cluster.resource(ref).namespaced:
            changes.append(Change(ref, "created"))
        else:
            before = cluster.get(ref)
            check([document], cluster.redactor, before)
            changes.append(_apply(cluster, document, before, force, dry_run=True))
    return changes


def apply(cluster: Cluster, documents: list[Document], force: bool = False) -> Iterator[Change]:
    """Each change as it is made, after a plan of all of them has passed."""
    skipped = {change.ref: change for change in plan(cluster, documents, force) if change.action == "skipped"}
    for document in in_order(documents):
        ref = Ref.of(document, cluster.namespace)
        if ref in skipped:
            yield skipped[ref]
        else:
            yield _apply(cluster, document, cluster.get(ref), force)


def delete(cluster: Cluster, refs: list[Ref], with_data: bool = False) -> Iterator[Removal]:
    """Delete objects, the last applied first. What holds data stays unless told."""
    for ref in sorted(refs, key=lambda ref: rank(ref.api_version, ref.kind), reverse=True):
        if ref.kind in HOLDS_DATA and not with_data:
            yield Removal(ref, "kept")
        elif _missing_extension(cluster, ref) or not cluster.delete(ref):
            yield Removal(ref, "absent")
        else:
            yield Removal(ref, "deleted")


def difference(change: Change, redactor: Redactor) -> str:
    """A unified diff of what is stored before and after, without secrets: only that one differs is shown."""
    before, after = change.before or {}, change.after or {}
    values = secret_values(before), secret_values(after)
    texts = []
    for document, others, when in ((before, values[1], "before"), (after, values[0], "after")):

        def mark(value: str, others: set[str] = others, when: str = when) -> str:
            return HIDDEN if value in others else f"{HIDDEN[:-1]}, {when})"

        shown = redactor.document(_essence(document), mark) if document else {}
        texts.append(yaml.safe_dump(shown, sort_keys=True).splitlines() if shown else [])
    lines = difflib.unified_diff(*texts, f"{change.ref} (stored)", f"{change.ref} (applied)", lineterm="")
    return "\n".join(lines)


def _apply(cluster: Cluster, document: Document, before: Document | None, force: bool, dry_run: bool = False) -> Change:
    ref = Ref.of(document, cluster.namespace)
    if before is None:
        return Change(ref, "created", None, cluster.apply(document, force, dry_run))
    kept, notes = _kept(before, document)
    try:
        after = cluster.apply(kept, force, dry_run)
    except ApiError as error:
        # To the server the list of groups is one field, and the autoscaler that writes a group's size owns it all.
        if not _autoscales(document) or error.conflicts != ("spec.workerGroupSpecs",):
            raise
        after = cluster.apply(kept, True, dry_run)
    same = _essence(before) == _essence(after)
    return Change(ref, "unchanged" if same else "configured", before, after, "; ".join(notes))


def _autoscales(document: Document) -> bool:
    return document["kind"] == "RayCluster" and bool(document["spec"].get("enableInTreeAutoscaling"))


def _kept(stored: Document, document: Document) -> tuple[Document, list[str]]:
    """The document with what is no longer its author's to say, and words for what that is.

    That is the size that the autoscaler has given to a group, and that a resource which is made suspended has been
    started (by ``submit``, a queue or a person).
    """
    spec, metadata, notes = dict(document.get("spec") or {}), dict(document["metadata"]), []
    if not document["apiVersion"].startswith("ray.io/"):
        return document, notes
    queue, queue_now = ((d["metadata"].get("labels") or {}).get(QUEUE, "") for d in (document, stored))
    if spec.get("suspend") and not stored["spec"].get("suspend"):
        spec["suspend"] = False
        notes.append("it was started and stays so")
    if queue.endswith(HELD) and queue_now == queue.removesuffix(HELD):
        metadata["labels"] = metadata["labels"] | {QUEUE: queue_now}
        notes = ["it was started and stays so"]
    if _autoscales(document):
        sizes = {
            group["groupName"]: {key: group[key] for key in ("replicas", "scaleStrategy") if key in group}
            for group in stored["spec"].get("workerGroupSpecs") or []
        }
        groups = [group | sizes.get(group["groupName"], {}) for group in spec.get("workerGroupSpecs") or []]
        if groups != spec.get("workerGroupSpecs"):
            spec["workerGroupSpecs"] = groups
            notes.append("its autoscaler's number of workers kept")
    return document | {"metadata": metadata, "spec": spec}, notes


def _essence(document: Document) -> Document:
    """Without what the server keeps for itself."""
    essence: dict[str, Any] = copy.deepcopy(document)
    essence.pop("status", None)
    for key in ("managedFields", "resourceVersion", "generation", "uid", "creationTimestamp", "selfLink"):
        essence.get("metadata", {}).pop(key, None)
    return essence


def _missing_extension(cluster: Cluster, ref: Ref) -> str:
    """Words for what defines the kind, if the cluster lacks it and can do without. Raises ApiError if it cannot."""
    try:
        cluster.resource(ref)
    except ApiError as error:
        optional = OPTIONAL_GROUPS.get(ref.api_version.split("/")[0])
        if error.status != 404 or optional is None:
            raise
        return optional
    return ""
