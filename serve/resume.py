"""A stream that lost its ingress goes on: its request is answered again, and the client gets what it has not got yet.

Greedy and seeded answers are the same text each time, but cut into events elsewhere. Knows no Ray.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

DONE = "[DONE]"


def is_last(events: bytes) -> bool:
    """Whether nothing comes after these events: the word that ends a stream, or an error."""
    return events.endswith(f"data: {DONE}\n\n".encode()) or events.startswith(b'data: {"error"')


class OtherAnswerError(Exception):
    """The second answer is not the one that the client has the beginning of."""


class Rest:
    """What is left to be said of a stream of chat completion chunks. sent: the events that the client has, whole."""

    def __init__(self, sent: bytes):
        chunks = [event for event in _events(sent) if not isinstance(event, str)]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        self._head = {name: chunk[name] for chunk in chunks[:1] for name in ("id", "created")}
        self._text = "".join(choice["delta"].get("content", "") for choice in choices)
        self._logprobs = sum(len(_logprobs(choice)) for choice in choices)
        self._finished = any(choice["finish_reason"] is not None for choice in choices)
        self._again = ""

    def of(self, events: bytes) -> bytes:
        """What of these events, which come next in the second answer, is new. Raises OtherAnswerError."""
        return b"".join(
            f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode()
            for event in map(self._new, _events(events))
            if event is not None
        )

    def _new(self, event: dict[str, Any] | str) -> dict[str, Any] | str | None:
        if isinstance(event, str) or "error" in event:
            return event
        event = event | self._head
        for choice in event["choices"]:
            if choice["finish_reason"] is not None:
                if len(self._again) < len(self._text):
                    raise OtherAnswerError
                return None if self._finished else event
            delta, begun = choice["delta"], bool(self._head)
            before, self._again = self._again, self._again + delta.get("content", "")
            if not _agree(self._again, self._text):
                raise OtherAnswerError
            delta["content"] = self._again[max(len(before), len(self._text)) :]
            logprobs = _logprobs(choice)
            known = min(self._logprobs, len(logprobs))
            self._logprobs -= known
            del logprobs[:known]
            if begun and not delta["content"] and not logprobs:
                return None
        return event


def _agree(one: str, other: str) -> bool:
    length = min(len(one), len(other))
    return one[:length] == other[:length]


def _logprobs(choice: dict[str, Any]) -> list[Any]:
    return (choice.get("logprobs") or {}).get("content", [])


def _events(data: bytes) -> Iterator[dict[str, Any] | str]:
    """The payloads of server-sent events: objects, and the word that ends a stream."""
    for line in data.decode().split("\n\n"):
        if payload := line.removeprefix("data: "):
            yield payload if payload == DONE else json.loads(payload)
