"""Kubernetes documents: what names one, where they are read from, and in which order they are applied."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from unimoe_ray.errors import UsageError

Document = dict[str, Any]
RAY = "ray.io/v1"
QUEUE = "kueue.x-k8s.io/queue-name"  # a label
HELD = "-held"  # ends the name of the queue out of which nothing is started
# Ten times as quick where libyaml is there; both make plain data only.
_LOADER = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader

# What others need comes first; what is not listed goes before ray.io's.
ORDER = (
    "Namespace",
    "CustomResourceDefinition",
    "PriorityClass",
    "StorageClass",
    "ServiceAccount",
    "Secret",
    "ConfigMap",
    "PersistentVolume",
    "PersistentVolumeClaim",
    "Role",
    "RoleBinding",
    "ResourceFlavor",
    "ClusterQueue",
    "LocalQueue",
    "NetworkPolicy",
    "Service",
    "PodDisruptionBudget",
)
LAST = ("RayCluster", "RayJob", "RayService")
# Deleting one of these deletes what runs have written.
HOLDS_DATA = ("PersistentVolumeClaim", "PersistentVolume", "Namespace")

# What a user may write before the slash.
KINDS = {
    "raycluster": (RAY, "RayCluster"),
    "rayjob": (RAY, "RayJob"),
    "rayservice": (RAY, "RayService"),
    "pod": ("v1", "Pod"),
    "job": ("batch/v1", "Job"),
    "deployment": ("apps/v1", "Deployment"),
    "statefulset": ("apps/v1", "StatefulSet"),
    "pvc": ("v1", "PersistentVolumeClaim"),
    "persistentvolumeclaim": ("v1", "PersistentVolumeClaim"),
    "namespace": ("v1", "Namespace"),
    "configmap": ("v1", "ConfigMap"),
    "secret": ("v1", "Secret"),
    "service": ("v1", "Service"),
    "serviceaccount": ("v1", "ServiceAccount"),
    "networkpolicy": ("networking.k8s.io/v1", "NetworkPolicy"),
    "poddisruptionbudget": ("policy/v1", "PodDisruptionBudget"),
}


@dataclass(frozen=True)
class Ref:
    """Names an object, or (without name) all of a kind in a namespace."""

    api_version: str
    kind: str
    namespace: str
    name: str = ""

    def __str__(self) -> str:
        return f"{self.kind.lower()}/{self.name}" if self.name else f"{self.kind.lower()}s"

    @classmethod
    def of(cls, document: Document, namespace: str) -> Ref:
        """``namespace``: for a document that names none."""
        metadata = document["metadata"]
        return cls(
            document["apiVersion"], document["kind"], metadata.get("namespace") or namespace, metadata.get("name", "")
        )

    @classmethod
    def parse(cls, text: str, namespace: str) -> Ref:
        """``rayjob/unimoe-align``. Raises UsageError."""
        kind, slash, name = text.partition("/")
        known = KINDS.get(kind.lower()) or KINDS.get(kind.lower().removesuffix("s"))
        if known is None or not slash or not name:
            raise UsageError(f"{text!r} names no object: write KIND/NAME; kinds: {', '.join(sorted(KINDS))}")
        return cls(*known, namespace, name)

    def other(self, kind: str, name: str = "") -> Ref:
        """An object of another kind (as in KINDS) in the same namespace."""
        return Ref(*KINDS[kind], self.namespace, name)

    def named(self, name: str) -> Ref:
        return replace(self, name=name)


def rank(api_version: str, kind: str) -> int:
    """The place of a kind in the order of applying."""
    if kind in LAST and api_version.startswith("ray.io/"):
        return len(ORDER) + 1 + LAST.index(kind)
    return ORDER.index(kind) if kind in ORDER else len(ORDER)


def in_order(documents: list[Document]) -> list[Document]:
    """As they are to be applied; those of one kind keep their order."""
    return sorted(documents, key=lambda document: rank(document["apiVersion"], document["kind"]))


def read(source: str) -> list[Document]:
    """The documents of a file, of all YAML files of a folder, of a kustomization's folder, or of stdin (``-``).

    Raises UsageError naming the file and what is wrong with it.
    """
    if source == "-":
        return parse(sys.stdin.read(), "stdin")
    path = Path(source)
    if path.is_dir():
        from unimoe_ray.kuberay.kustomize import FILE, build

        if (path / FILE).is_file():
            return build(path)
        files = sorted([*path.glob("*.yaml"), *path.glob("*.yml")])
        if not files:
            raise UsageError(f"{source}: no YAML files in this folder")
        return [document for file in files for document in read_file(file)]
    return read_file(path)


def read_file(path: Path) -> list[Document]:
    """The documents of a YAML file, Lists taken apart."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file or folder")
    return parse(path.read_text(encoding="utf-8"), str(path))


def parse(text: str, where: str) -> list[Document]:
    """The documents of a text, Lists taken apart; ``where`` it is from, for errors."""
    try:
        loaded = [document for document in yaml.load_all(text, Loader=_LOADER) if document is not None]
    except yaml.YAMLError as error:
        raise UsageError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    documents: list[Document] = []
    for document in loaded:
        if isinstance(document, dict) and document.get("kind") == "List":
            documents += document.get("items") or []
        else:
            documents.append(document)
    for number, document in enumerate(documents, start=1):
        if problem := _incomplete(document):
            raise UsageError(f"{where}: document {number} {problem}")
    return documents


def _incomplete(document: Any) -> str:
    if not isinstance(document, dict):
        return "is no mapping"
    missing = [key for key in ("apiVersion", "kind") if not isinstance(document.get(key), str)]
    if missing:
        return f"has no {' and no '.join(missing)}"
    metadata = document.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("name"), str) or not metadata["name"]:
        return f"({document['kind']}) has no metadata.name"
    return ""
