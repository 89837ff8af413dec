"""Why a pod is not placed on a node: the scheduler's message, taken apart."""

from __future__ import annotations

import re
from typing import Any

from unimoe_ray.kuberay.documents import Document

_NODES = re.compile(r"^0/(?P<nodes>\d+) nodes are available: (?P<reasons>.*?)\.?(?: preemption: .*)?$", re.DOTALL)
_SEPARATOR = re.compile(r", (?=\d+ |pod |persistentvolumeclaim )|\. (?=\d+ |pod )")


def unschedulable(pod: Document, message: str) -> str:
    """``no node of 3 fits: 2 lack nvidia.com/gpu (the pod asks for 1); 1 has the taint spot=true, not tolerated``."""
    if match := _NODES.match(message.strip()):
        reasons = [_reason(text.strip(), pod) for text in _SEPARATOR.split(match["reasons"]) if text.strip()]
        nodes = int(match["nodes"])
        return f"no node of {nodes} fits: {'; '.join(reasons)}" if nodes else "the cluster has no nodes"
    if "no nodes available" in message:
        return "the cluster has no nodes"
    return _reason(message.strip().rstrip("."), pod)


def _reason(text: str, pod: Document) -> str:
    if match := re.fullmatch(r"(\d+) Insufficient (\S+)", text):
        count, resource = int(match[1]), match[2].rstrip(".")
        return f"{count} lack{'s' if count == 1 else ''} {resource} (the pod asks for {requested(pod, resource)})"
    if match := re.fullmatch(r"(\d+) node\(s\) had untolerated taint(?:\(s\))? ?(?:\{(.*)\})?", text):
        taint = re.sub(r":\s*$", "", match[2] or "").replace(": ", "=")
        return f"{_count(match[1], 'has', 'have')} the taint {taint or '(not named)'}, which the pod does not tolerate"
    for pattern, words in _OTHER:
        if match := re.search(pattern, text):
            number = re.match(r"(\d+) ", text)
            count = f"{number[1]}: " if number else ""
            return count + words.format(*match.groups(), selector=_selector(pod))
    return text


_OTHER = (
    (r"didn't match Pod's node affinity", "not the nodes of its selector ({selector})"),
    (r"didn't match pod topology spread constraints", "its topology spread constraint would be broken"),
    (r"didn't match pod anti-affinity rules", "its anti-affinity to other pods"),
    (r"didn't match pod affinity rules", "no pod there that it must be near"),
    (r"had volume node affinity conflict", "its volume is bound to another zone or node"),
    (r"unbound immediate PersistentVolumeClaims", "its volume claim is not bound"),
    (r'persistentvolumeclaim "(.+?)" not found', "its volume claim {0!r} does not exist"),
    (r"Too many pods", "full, no more pods allowed on it"),
    (r"were unschedulable", "closed to new pods (cordoned)"),
    (r"didn't have free ports", "its host ports are taken"),
)


def _count(number: str, one: str, many: str) -> str:
    return f"{number} {one if number == '1' else many}"


def _selector(pod: Document) -> str:
    spec = pod.get("spec", {})
    parts = [f"{key}={value}" for key, value in (spec.get("nodeSelector") or {}).items()]
    required = ((spec.get("affinity") or {}).get("nodeAffinity") or {}).get(
        "requiredDuringSchedulingIgnoredDuringExecution"
    ) or {}
    for term in required.get("nodeSelectorTerms") or []:
        for rule in term.get("matchExpressions") or []:
            values = ", ".join(rule.get("values") or [])
            parts.append(f"{rule['key']} {rule['operator']}" + (f" ({values})" if values else ""))
    return "; ".join(parts) or "not stated"


def requested(pod: Document, resource: str) -> str:
    """What a pod's containers ask for, as written; several that differ are joined: ``8Gi+512Mi``."""
    amounts = [
        amount for container in pod.get("spec", {}).get("containers") or [] if (amount := _ask(container, resource))
    ]
    return "+".join(amounts) or "none"


def _ask(container: dict[str, Any], resource: str) -> str | None:
    """The request, or the limit where only that is stated, as Kubernetes takes it."""
    resources = container.get("resources") or {}
    amount = (resources.get("requests") or {}).get(resource) or (resources.get("limits") or {}).get(resource)
    return None if amount is None else str(amount)
