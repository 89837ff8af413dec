"""Kustomizations without kubectl: resources, ConfigMaps of files, namespace, labels and patches; no other key.

A merge patch replaces lists whole, as kustomize does for custom resources; for Kubernetes' own kinds, whose lists it
merges by keys, patches that hold lists must be JSON patches here.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import yaml

from unimoe_ray.errors import UsageError
from unimoe_ray.kuberay.documents import Document, parse, read_file

FILE = "kustomization.yaml"
_KEYS = {
    "apiVersion",
    "kind",
    "metadata",
    "resources",
    "namespace",
    "labels",
    "patches",
    "configMapGenerator",
    "generatorOptions",
}
_WITHOUT_NAMESPACE = {
    "Namespace",
    "PriorityClass",
    "StorageClass",
    "PersistentVolume",
    "ResourceFlavor",
    "ClusterQueue",
}


def build(folder: Path) -> list[Document]:
    """The documents that ``kubectl kustomize FOLDER`` prints, in the order of the resources. Raises UsageError."""
    file = folder / FILE
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    if unknown := sorted(set(given) - _KEYS):
        raise UsageError(
            f"{file}: {', '.join(unknown)} cannot be read here; use: kubectl kustomize {folder} | unimoe k8s apply -"
        )
    documents = [document for entry in given.get("resources") or [] for document in _resource(folder, entry)]
    options = given.get("generatorOptions") or {}
    documents += [_config_map(folder, entry, options) for entry in given.get("configMapGenerator") or []]
    for patch in given.get("patches") or []:
        documents = _patched(documents, patch, folder)
    for entry in given.get("labels") or []:
        if set(entry) - {"pairs"}:
            raise UsageError(
                f"{file}: labels: only pairs can be read here, not {', '.join(sorted(set(entry) - {'pairs'}))}"
            )
        for document in documents:
            document["metadata"]["labels"] = (document["metadata"].get("labels") or {}) | entry["pairs"]
    if namespace := given.get("namespace"):
        for document in documents:
            if document["kind"] == "Namespace":
                document["metadata"]["name"] = namespace
            elif document["kind"] not in _WITHOUT_NAMESPACE:
                document["metadata"]["namespace"] = namespace
    return documents


def _resource(folder: Path, entry: str) -> list[Document]:
    path = folder / entry
    if "://" in entry:
        raise UsageError(f"{folder / FILE}: {entry}: only files and folders can be read here")
    return build(path) if path.is_dir() else read_file(path)


def _config_map(folder: Path, entry: dict[str, Any], options: dict[str, Any]) -> Document:
    """Its name as given: with the hash of its content, references in custom resources could not be told from text."""
    where = f"{folder / FILE}: configMapGenerator {entry.get('name')}"
    if not options.get("disableNameSuffixHash"):
        raise UsageError(f"{where}: needs generatorOptions.disableNameSuffixHash: true to be read here")
    if unknown := sorted(set(entry) - {"name", "namespace", "files"}):
        raise UsageError(f"{where}: {', '.join(unknown)} cannot be read here")
    metadata = {key: entry[key] for key in ("name", "namespace") if key in entry}
    metadata |= {key: dict(options[key]) for key in ("labels", "annotations") if options.get(key)}
    data = {}
    for file in entry.get("files") or []:
        key, _, path = file.rpartition("=")
        data[key or Path(path).name] = (folder / path).read_text(encoding="utf-8")
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _patched(documents: list[Document], patch: dict[str, Any], folder: Path) -> list[Document]:
    where = str(folder / patch["path"]) if "path" in patch else f"{folder / FILE}: patch"
    text = (folder / patch["path"]).read_text(encoding="utf-8") if "path" in patch else patch["patch"]
    content = yaml.safe_load(text)
    target = patch.get("target")
    if not isinstance(content, list):
        [content] = parse(text, where)
        target = target or {"kind": content["kind"], "name": content["metadata"]["name"]}
    if not target:
        raise UsageError(f"{where}: a JSON patch needs a target")
    hit = [_matches(document, target) for document in documents]
    if not any(hit):
        raise UsageError(f"{where}: no resource matches its target {target}")
    change = _json_patch if isinstance(content, list) else _merge_patch
    return [
        change(document, content, where) if chosen else document
        for document, chosen in zip(documents, hit, strict=True)
    ]


def _matches(document: Document, target: dict[str, str]) -> bool:
    """kustomize takes names and kinds of a target as anchored regular expressions."""
    group, _, version = document["apiVersion"].rpartition("/")
    metadata = document["metadata"]
    have = {"group": group, "version": version, "kind": document["kind"], "name": metadata["name"]}
    have["namespace"] = metadata.get("namespace", "default")
    if unknown := set(target) - {*have, "labelSelector"}:
        raise UsageError(f"patch target: {', '.join(sorted(unknown))} cannot be read here")
    labels = metadata.get("labels") or {}
    selector = [rule.strip().partition("=") for rule in target.get("labelSelector", "").split(",") if rule.strip()]
    return all(labels.get(key) == value for key, _, value in selector) and all(
        re.fullmatch(pattern, have[key]) for key, pattern in target.items() if key in have
    )


def _merge_patch(document: Document, patch: Document, where: str) -> Document:
    own_kind = "." not in document["apiVersion"].partition("/")[0] or document["apiVersion"].split("/")[0].endswith(
        ".k8s.io"
    )
    if own_kind and _has_list(patch):
        raise UsageError(f"{where}: lists in {document['kind']} need a JSON patch here")
    names = {key: document["metadata"][key] for key in ("name", "namespace") if key in document["metadata"]}
    merged = _merged(document, patch)
    merged["metadata"] |= names
    return merged


def _has_list(node: Any) -> bool:
    return isinstance(node, list) or (isinstance(node, dict) and any(map(_has_list, node.values())))


def _merged(old: Any, new: Any) -> Any:
    """JSON merge patch (RFC 7386)."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return copy.deepcopy(new)
    merged = {key: value for key, value in old.items() if new.get(key, value) is not None}
    for key, value in new.items():
        if value is not None:
            merged[key] = _merged(merged.get(key), value)
    return merged


def _json_patch(document: Document, patch: list[dict[str, Any]], where: str) -> Document:
    """JSON patch (RFC 6902): add, replace, remove and test."""
    document = copy.deepcopy(document)
    for step in patch:
        keys = [key.replace("~1", "/").replace("~0", "~") for key in step["path"].split("/")[1:]]
        try:
            _step(document, step, keys)
        except (KeyError, IndexError, ValueError, TypeError):
            raise UsageError(f"{where}: {step['op']} {step['path']}: not in {document['kind']}") from None
    return document


def _step(document: Document, step: dict[str, Any], keys: list[str]) -> None:
    node: Any = document
    for key in keys[:-1]:
        node = node[int(key)] if isinstance(node, list) else node[key]
    last: Any = keys[-1]
    if isinstance(node, list):
        last = len(node) if last == "-" else int(last)
    match step["op"]:
        case "add" if isinstance(node, list):
            node.insert(last, copy.deepcopy(step["value"]))
        case "add":
            node[last] = copy.deepcopy(step["value"])
        case "replace":
            _ = node[last]
            node[last] = copy.deepcopy(step["value"])
        case "remove":
            del node[last]
        case "test":
            if node[last] != step["value"]:
                raise ValueError
        case _:
            raise ValueError
