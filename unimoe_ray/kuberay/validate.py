"""Every mistake in a manifest, with its place, before anything is sent to a cluster."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from unimoe_ray.kuberay.core import core_kind, core_problems, quantity_problems, unknown_field
from unimoe_ray.kuberay.models import API_VERSION, KINDS, Core, KubeModel
from unimoe_ray.kuberay.problems import Path, Problem, problem
from unimoe_ray.kuberay.rules import operator_problems

# Fields that the API server never lets change, below the specification of a cluster or of the object itself.
_IMMUTABLE_OF_CLUSTER = (("managedBy",), ("gcsFaultToleranceOptions", "backend"))
_IMMUTABLE = {
    "RayCluster": [("spec", *path) for path in _IMMUTABLE_OF_CLUSTER],
    "RayJob": [("spec", "managedBy"), *(("spec", "rayClusterSpec", *path) for path in _IMMUTABLE_OF_CLUSTER)],
    "RayService": [("spec", "managedBy"), *(("spec", "rayClusterConfig", *path) for path in _IMMUTABLE_OF_CLUSTER)],
}


def is_checked(document: dict[str, Any]) -> bool:
    """Whether ``validate`` knows the kind: KubeRay's three and Kubernetes' own."""
    return _is_ray(document) or core_kind(document) is not None


def validate(document: dict[str, Any], stored: dict[str, Any] | None = None) -> list[Problem]:
    """What an API server with KubeRay's resources, or KubeRay's operator, would refuse; empty: nothing.

    stored: the object as it is in the cluster; then fields that cannot change are compared, too. A document of a kind
    that is not known (``is_checked``) has no problems beyond its first four fields.
    """
    found = list(_frame_problems(document))
    if found:
        return found
    if not _is_ray(document):
        kind = core_kind(document)
        return [] if kind is None else list(core_problems(document, kind, ()))
    model = KINDS.get(document["kind"]) if document["apiVersion"] == API_VERSION else None
    if model is None:
        text = f"{document['apiVersion']} {document['kind']}"
        return [problem(("kind",), f"is {text}; known: {', '.join(KINDS)} of {API_VERSION}")]
    found += _marked_problems(document, model, ())
    try:
        resource = model.model_validate(document)
    except ValidationError as error:
        found += _model_problems(error, model)
    else:
        if not found:
            found += operator_problems(resource)
    if stored is not None:
        found += _changes(document, stored)
    return list(dict.fromkeys(found))


def _is_ray(document: dict[str, Any]) -> bool:
    return str(document.get("apiVersion")).startswith("ray.io/")


def _frame_problems(document: dict[str, Any]) -> Iterator[Problem]:
    for key in ("apiVersion", "kind"):
        if not isinstance(document.get(key), str):
            yield problem((key,), "is missing")
    metadata = document.get("metadata")
    if not isinstance(metadata, dict) or not (metadata.get("name") or metadata.get("generateName")):
        yield problem(("metadata", "name"), "is missing")


def _marked_problems(value: Any, model: type[BaseModel], path: Path) -> Iterator[Problem]:
    """Of all data in a document that the models mark as Kubernetes' own."""
    if not isinstance(value, dict):
        return
    for name, field in model.model_fields.items():
        key = field.alias or name
        if value.get(key) is not None:
            for kind in [*field.metadata, *_kinds(field.annotation)]:
                yield from _problems_of_kind(value[key], kind, (*path, key))


def _problems_of_kind(value: Any, kind: Any, path: Path) -> Iterator[Problem]:
    if isinstance(kind, Core):
        yield from quantity_problems(value, path) if kind.name == "quantity" else core_problems(value, kind.name, path)
    elif isinstance(kind, tuple):
        for index, item in enumerate(value if isinstance(value, list) else []):
            yield from _problems_of_kind(item, kind[0], (*path, index))
    elif isinstance(kind, type):
        yield from _marked_problems(value, kind, path)


def _kinds(annotation: Any) -> list[Any]:
    """Marks and models inside a field's type; those of a list's items as a 1-tuple."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return [mark for mark in arguments[1:] if isinstance(mark, Core)] or _kinds(arguments[0])
    if origin is list:
        return [(kind,) for kind in _kinds(arguments[0])]
    if origin in (Union, types.UnionType):
        return [kind for argument in arguments for kind in _kinds(argument)]
    return []


def _model_problems(error: ValidationError, model: type[KubeModel]) -> Iterator[Problem]:
    """pydantic's errors in our words."""
    for item in error.errors(include_url=False):
        path = tuple(part for part in item["loc"] if not str(part).startswith(("function-", "constrained-")))
        kind, given = item["type"], item["input"]
        if kind == "extra_forbidden":
            yield unknown_field(path, _fields(model, path[:-1]))
        elif kind == "missing":
            yield problem(path, "is missing")
        elif kind == "value_error":
            yield problem(path, item["msg"].removeprefix("Value error, "))
        else:
            shown = f"is {given!r}; " if isinstance(given, str | int | float | bool) else ""
            quoted = f"; quote it: '{given}'" if kind == "string_type" and shown else ""
            yield problem(path, shown + item["msg"][0].lower() + item["msg"][1:] + quoted)


def _fields(model: type[BaseModel], path: Path) -> list[str]:
    """The names of the fields of the model that a path leads to."""
    for part in path:
        if not isinstance(part, int):
            field = next(field for name, field in model.model_fields.items() if (field.alias or name) == part)
            kinds = [kind[0] if isinstance(kind, tuple) else kind for kind in _kinds(field.annotation)]
            model = next(kind for kind in kinds if isinstance(kind, type))
    return [field.alias or name for name, field in model.model_fields.items()]


def _changes(document: dict[str, Any], stored: dict[str, Any]) -> Iterator[Problem]:
    for path in _IMMUTABLE[document["kind"]]:
        before, after = _at(stored, path), _at(document, path)
        if before is not None and after is not None and before != after:
            yield problem(path, f"is immutable: it is {before!r} in the cluster and would become {after!r}")


def _at(value: Any, path: Path) -> Any:
    for part in path:
        value = value.get(part) if isinstance(value, dict) else None
    return value
