"""What goes wrong between us and an API server, each as one line."""

from __future__ import annotations

import json
import re
from typing import Any

from unimoe_ray.errors import UnimoeError
from unimoe_ray.kuberay.refusals import in_words


class Unreachable(UnimoeError):
    """The API server gave no answer."""


class ApiError(UnimoeError):
    """The API server's answer is no.

    status: of HTTP. conflicts: fields that another manager owns, where those are the reason.
    """

    def __init__(self, message: str, status: int, conflicts: tuple[str, ...] = ()):
        super().__init__(message)
        self.status, self.conflicts = status, conflicts


class Expired(ApiError):
    """The resource version to watch from is no longer kept (410): list again."""

    def __init__(self, message: str):
        super().__init__(message, 410)


def api_error(status: int, text: str, what: str, server: str) -> ApiError:
    """``text``: the body of the answer, usually a Status object; ``what``: what was tried, such as "apply rayjob/x"."""
    answer = _status(text)
    message = " ".join(str(answer.get("message") or text.strip()[:300] or "no reason given").split())
    causes = (answer.get("details") or {}).get("causes") or []
    if status == 410:
        return Expired(f"{what}: {message}")
    if status == 401:
        return ApiError(
            f"{server} does not accept these credentials (401): log in again, or name another --context", 401
        )
    if (known := in_words(message)) is not None:
        return ApiError(f"{what}: {known}", status)
    if match := _UNTYPED.match(message):
        return ApiError(f"{what}: refused by the API server: {match[1]}", 400)
    if status == 403:
        return ApiError(f"{what}: not allowed (403): {message}", status)
    if fields := tuple(
        str(cause.get("field", "")).lstrip(".") for cause in causes if cause.get("reason") == "FieldManagerConflict"
    ):
        owners = ", ".join(sorted({str(cause.get("message", "")).removeprefix("conflict with ") for cause in causes}))
        text = f"{what}: owned by {owners}: {', '.join(fields)}; --force-conflicts takes them over"
        return ApiError(text, status, fields)
    if status in (400, 422):
        return ApiError(f"{what}: refused by the API server: {_causes(causes) or message}", status)
    return ApiError(f"{what}: {message} ({status})", status)


# Server-side apply answers so, with status 500, to a field that does not exist.
_UNTYPED = re.compile(r"failed to create typed patch object \([^)]*\): (.*)")


def _status(text: str) -> dict[str, Any]:
    try:
        answer = json.loads(text)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _causes(causes: list[dict[str, Any]]) -> str:
    """``spec.managedBy: Invalid value: "string": the managedBy field is immutable``, several joined."""
    lines = [
        f"{cause['field']}: {cause.get('message', '')}"
        if cause.get("field") not in (None, "<nil>")
        else str(cause.get("message", ""))
        for cause in causes
    ]
    return "; ".join(dict.fromkeys(line for line in lines if line))
