"""Secrets stay out of everything that is printed: documents, differences, errors and logs."""

from __future__ import annotations

import base64
import binascii
import copy
import re
from collections.abc import Callable
from typing import Any

HIDDEN = "(hidden)"
LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"

# Shorter values (a port, initials) would take half of the text with them; their fields are hidden all the same.
MIN_KNOWN_LENGTH = 4

_SECRET_NAME = re.compile(
    r"(?i)(password|passwd|secret|token|credential|api[_-]?key|access[_-]?key|private[_-]?key)s?$"
)
_PATTERNS = (
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    re.compile(r"(?i)(?<=bearer )[\w.~+/=-]{8,}"),
    re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"),  # JSON web tokens
    re.compile(r"\b(?:hf_|sk-|gh[pousr]_|AKIA)[\w-]{16,}"),
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),
    re.compile(
        r"(?i)(?<![a-z])(?:[\w-]*[_-])?(?:password|passwd|secret|token|api[_-]?key|access[_-]?key)"
        r"[\"']?[ \t]*[:=][ \t]*[\"']?(?P<value>[^\s\"',}]{8,})"
    ),
)


class Redactor:
    """Takes known secret values, and what looks like one, out of text. It learns the values from documents."""

    def __init__(self) -> None:
        self._values: set[str] = set()

    def learn(self, value: str) -> None:
        """A secret value; it is also known line by line and in base64."""
        for text in {value, *value.splitlines()}:
            stripped = text.strip()
            if len(stripped) >= MIN_KNOWN_LENGTH:
                self._values |= {stripped, base64.b64encode(text.encode()).decode()}
        if len(value) >= MIN_KNOWN_LENGTH:
            self._values.add(base64.b64encode(value.encode()).decode())

    def learn_document(self, document: dict[str, Any]) -> None:
        """The values of a Secret, and those of environment variables that are named like one."""
        if document.get("kind") == "Secret":
            for text in (document.get("stringData") or {}).values():
                self.learn(str(text))
            for text in (document.get("data") or {}).values():
                self._learn_encoded(str(text))
        for entry in _environment(document):
            self.learn(entry["value"])

    def _learn_encoded(self, text: str) -> None:
        if len(text) >= MIN_KNOWN_LENGTH:
            self._values.add(text)
        try:
            self.learn(base64.b64decode(text, validate=True).decode())
        except (binascii.Error, UnicodeDecodeError):
            return  # Bytes that are no text can't show up in text other than encoded.

    def text(self, text: str) -> str:
        """The text without secrets."""
        for value in sorted(self._values, key=len, reverse=True):
            text = text.replace(value, HIDDEN)
        for pattern in _PATTERNS:
            text = pattern.sub(_hide_value, text)
        return text

    def document(self, document: dict[str, Any], mark: Callable[[str], str] = lambda value: HIDDEN) -> dict[str, Any]:
        """A copy to show: ``mark(value)`` stands for each secret value."""
        self.learn_document(document)
        shown = copy.deepcopy(document)
        if shown.get("kind") == "Secret":
            for field in ("data", "stringData"):
                if shown.get(field):
                    shown[field] = {key: mark(str(value)) for key, value in shown[field].items()}
        for entry in _environment(shown):
            entry["value"] = mark(entry["value"])
        (shown.get("metadata", {}).get("annotations") or {}).pop(LAST_APPLIED, None)
        return self._strings(shown)

    def _strings(self, node: Any) -> Any:
        if isinstance(node, dict):
            return {key: self._strings(value) for key, value in node.items()}
        if isinstance(node, list):
            return [self._strings(value) for value in node]
        return self.text(node) if isinstance(node, str) else node


def secret_values(document: dict[str, Any]) -> set[str]:
    """As they stand in the document."""
    found = {entry["value"] for entry in _environment(document)}
    if document.get("kind") == "Secret":
        found |= {str(text) for field in ("data", "stringData") for text in (document.get(field) or {}).values()}
    return found


def _hide_value(match: re.Match[str]) -> str:
    if "value" not in match.re.groupindex:
        return HIDDEN
    start = match.start("value") - match.start()
    return match[0][:start] + HIDDEN + match[0][start + len(match["value"]) :]


def _environment(node: Any) -> list[dict[str, Any]]:
    """Entries ``{name, value}`` anywhere in a document whose name says that the value is secret."""
    if isinstance(node, list):
        return [entry for value in node for entry in _environment(value)]
    if not isinstance(node, dict):
        return []
    name, value = node.get("name"), node.get("value")
    if isinstance(name, str) and isinstance(value, str) and value and _SECRET_NAME.search(name):
        return [node]
    return [entry for value in node.values() for entry in _environment(value)]
