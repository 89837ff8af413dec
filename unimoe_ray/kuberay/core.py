"""Documents of Kubernetes' own kinds, checked offline against the types of the ``kubernetes`` package.

Those types are generated from the API's OpenAPI description; unlike the package's own readers this one refuses what a
strict API server refuses: unknown fields, wrong types, missing fields, quantities that are none. A field that is null
counts as left out.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from unimoe_ray.kuberay.problems import Path, Problem, problem

QUANTITY = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?\d+)?")
_GENERIC = re.compile(r"(List|Dict)\[(?:str, )?(.+)\]")
_SCALARS = {"str": str, "int": int, "float": (int, float), "bool": bool, "datetime": str, "date": str}
_NAMES = {str: "a string", int: "a whole number", (int, float): "a number", bool: "true or false"}
# The description calls these plain strings; numbers are allowed too, and not every string is.
_QUANTITIES = {
    ("V1ResourceRequirements", "limits"),
    ("V1ResourceRequirements", "requests"),
    ("V1VolumeResourceRequirements", "limits"),
    ("V1VolumeResourceRequirements", "requests"),
    ("V1EmptyDirVolumeSource", "size_limit"),
    ("V1ResourceFieldSelector", "divisor"),
    ("V1PodSpec", "overhead"),
    ("V1ResourceQuotaSpec", "hard"),
}
# Fields of any type in the description that take a number or a name.
_INT_OR_STRING = {"port", "target_port", "max_surge", "max_unavailable", "min_available"}
# Lists whose entries are told apart by a key.
_KEYS = {
    ("V1PodSpec", "containers"): "name",
    ("V1PodSpec", "init_containers"): "name",
    ("V1PodSpec", "volumes"): "name",
    ("V1Container", "env"): "name",
    ("V1Container", "volume_mounts"): "mountPath",
}
# Kinds whose type's name is not V1 and the kind's name, by API version.
_API_VERSIONS = {
    "v1": "V1{}",
    "apps/v1": "V1{}",
    "batch/v1": "V1{}",
    "networking.k8s.io/v1": "V1{}",
    "policy/v1": "V1{}",
    "rbac.authorization.k8s.io/v1": "V1{}",
    "scheduling.k8s.io/v1": "V1{}",
    "storage.k8s.io/v1": "V1{}",
}


def core_kind(document: dict[str, Any]) -> str | None:
    """The name of the type of a document; None for a kind that Kubernetes itself does not have."""
    pattern = _API_VERSIONS.get(str(document.get("apiVersion")))
    name = pattern.format(document.get("kind")) if pattern else None
    return name if name and _type(name) is not None else None


def core_problems(value: Any, type_name: str, path: Path) -> Iterator[Problem]:
    """What a strict API server would not take, of a value that should be a ``V1PodTemplateSpec`` or the like."""
    if value is None:
        yield problem(path, "is null")
        return
    generic = _GENERIC.fullmatch(type_name)
    if generic and generic[1] == "List":
        if not isinstance(value, list):
            yield problem(path, f"is {value!r}; must be a list")
            return
        for index, item in enumerate(value):
            yield from core_problems(item, generic[2], (*path, index))
    elif generic:
        if not isinstance(value, dict):
            yield problem(path, f"is {value!r}; must be a mapping")
            return
        for key, item in value.items():
            yield from core_problems(item, generic[2], (*path, str(key)))
    elif type_name in _SCALARS:
        yield from _scalar_problems(value, type_name, path)
    elif (kind := _type(type_name)) is not None:
        yield from _object_problems(value, type_name, kind, path)


def quantity_problems(value: Any, path: Path) -> Iterator[Problem]:
    """``500m``, ``4Gi``, 2: amounts of resources."""
    if isinstance(value, bool) or not QUANTITY.fullmatch(str(value)):
        yield problem(path, f"is {value!r}; must be a quantity such as 500m, 2 or 4Gi")


def unknown_field(path: Path, known: list[str]) -> Problem:
    nearest = difflib.get_close_matches(str(path[-1]), known, n=1)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else f"; allowed: {', '.join(sorted(known))}"
    return problem(path, f"unknown field{hint}")


def _scalar_problems(value: Any, type_name: str, path: Path) -> Iterator[Problem]:
    wanted = _SCALARS[type_name]
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        quoted = f"; quote it: '{value}'" if wanted is str and isinstance(value, int | float) else ""
        yield problem(path, f"is {value!r}; must be {_NAMES[wanted]}{quoted}")


def _object_problems(value: Any, type_name: str, kind: type, path: Path) -> Iterator[Problem]:
    if not isinstance(value, dict):
        yield problem(path, f"is {value!r}; must be a mapping with fields of {type_name.removeprefix('V1')}")
        return
    fields = {kind.attribute_map[attribute]: attribute for attribute in kind.openapi_types}
    for key, item in value.items():
        if key not in fields:
            yield unknown_field((*path, str(key)), list(fields))
            continue
        attribute, here = fields[key], (*path, key)
        if item is None:
            continue
        if (type_name, attribute) in _QUANTITIES:
            many = item.items() if isinstance(item, dict) else [(None, item)]
            for name, amount in many:
                yield from quantity_problems(amount, here if name is None else (*here, name))
        elif kind.openapi_types[attribute] == "object" and attribute in _INT_OR_STRING:
            if isinstance(item, bool) or not isinstance(item, int | str):
                yield problem(here, f"is {item!r}; must be a whole number or a string")
        else:
            yield from core_problems(item, kind.openapi_types[attribute], here)
            if key_field := _KEYS.get((type_name, attribute)):
                yield from _duplicates(item, key_field, here)
    for name, field in kind.model_fields.items():
        key = field.serialization_alias or name
        if value.get(key) is None and field.is_required():
            yield problem((*path, key), "is missing")


def _duplicates(items: Any, key: str, path: Path) -> Iterator[Problem]:
    seen: set[Any] = set()
    for index, item in enumerate(items if isinstance(items, list) else []):
        name = item.get(key) if isinstance(item, dict) else None
        if isinstance(name, str) and name in seen:
            yield problem((*path, index, key), f"'{name}' is there twice")
        seen.add(name if isinstance(name, str) else None)


@cache
def _type(name: str) -> type | None:
    from kubernetes.client import models

    return getattr(models, name, None)
