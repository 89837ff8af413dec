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
from unimoe_ray.kuberay.documents import HOLDS_DATA, Document, Ref, in_order
from unimoe_ray.kuberay.errors import ApiError
from unimoe_ray.kuberay.models import validate
from unimoe_ray.kuberay.redact import HIDDEN, Redactor, secret_values

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


def check(documents: list[Document]) -> None:
    """Our own validation of every ray.io document. Raises UsageError naming each field that is wrong, and why."""
    problems = [
        f"{document['kind'].lower()}/{document['metadata']['name']}: {problem.path}: {problem.reason}"
        for document in documents
        if document["apiVersion"].startswith("ray.io/")
        for problem in validate(document)
    ]
    if problems:
        raise UsageError("; ".join(problems))


def plan(cluster: Cluster, documents: list[Document], force: bool = False) -> list[Change]:
    """What applying them would change, in the order of applying; nothing is written.

    The server judges every document (a dry run), except those in a namespace that is yet to be made. Raises
    UsageError for a document that we refuse, ApiError for one that the server refuses.
    """
    check(documents)
    ordered = in_order(documents)
    refs = [Ref.of(document, cluster.namespace) for document in ordered]
    if twice := sorted({str(ref) for ref in refs if refs.count(ref) > 1}):
        raise UsageError(f"given twice: {', '.join(twice)}")
    skipped = {ref: missing for ref in refs if (missing := _missing_extension(cluster, ref))}
    made_here = {ref.name for ref in refs if ref.kind == "Namespace" and cluster.get(ref) is None}
    changes = []
    for ref, document in zip(refs, ordered, strict=True):
        if ref in skipped:
            changes.append(Change(ref, "skipped", note=f"the cluster has no {skipped[ref]}"))
        elif ref.namespace in made_here and cluster.resource(ref).namespaced:
            changes.append(Change(ref, "created"))
        else:
            before = cluster.get(ref)
            changes.append(_change(ref, before, cluster.apply(document, force, dry_run=True)))
    return changes


def apply(cluster: Cluster, documents: list[Document], force: bool = False) -> Iterator[Change]:
    """Each change as it is made, after a plan of all of them has passed."""
    skipped = {change.ref: change for change in plan(cluster, documents, force) if change.action == "skipped"}
    for document in in_order(documents):
        ref = Ref.of(document, cluster.namespace)
        if ref in skipped:
            yield skipped[ref]
        else:
            before = cluster.get(ref)
            yield _change(ref, before, cluster.apply(document, force))


def delete(cluster: Cluster, documents: list[Document], with_data: bool = False) -> Iterator[str]:
    """Delete what the documents name, the last applied first; a line for each. What holds data stays unless told."""
    for document in reversed(in_order(documents)):
        ref = Ref.of(document, cluster.namespace)
        if ref.kind in HOLDS_DATA and not with_data:
            yield f"{ref} kept (it holds what runs have written; --with-data deletes it)"
        elif _missing_extension(cluster, ref):
            yield f"{ref} not there"
        else:
            yield f"{ref} {'deleted' if cluster.delete(ref) else 'not there'}"


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


def _change(ref: Ref, before: Document | None, after: Document) -> Change:
    if before is None:
        return Change(ref, "created", None, after)
    same = _essence(before) == _essence(after)
    return Change(ref, "unchanged" if same else "configured", before, after)


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
