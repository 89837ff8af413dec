"""What travels between the deployments. Light to import: the ingress needs no torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from unimoe_ray.inference.request import Output, SamplingParams


@dataclass(frozen=True)
class MediaFile:
    """One media file of a request. kind: image, video, audio or speech; name: the request part, for messages;
    trace: the W3C traceparent of the request that it is encoded for."""

    kind: str
    data: bytes
    name: str
    alone: bool = False
    trace: str = ""

    @property
    def key(self) -> str:
        """What the same content of the same kind has in common."""
        return f"{self.kind}/{hashlib.sha256(self.data).hexdigest()}"


@dataclass(frozen=True)
class Task:
    """What the language model is asked. turns: (question with placeholders, answer), the last answer empty; kinds: of
    the media files, in the order of their placeholders. trial, generated, priority: as in ``GenerationRequest``;
    trace: its W3C traceparent."""

    request_id: str
    turns: tuple[tuple[str, str], ...]
    kinds: tuple[str, ...]
    params: SamplingParams
    trial: int = 0
    generated: tuple[int, ...] = ()
    priority: int = 0
    trace: str = ""

    def key(self, media_keys: list[str]) -> str:
        """What identifies the work, whoever asks for it."""
        parts = repr((self.turns, replace(self.params, seed=None), media_keys))
        return f"request/{hashlib.sha256(parts.encode('utf-8', 'surrogatepass')).hexdigest()}"


@dataclass(frozen=True)
class Started:
    """The first thing a language model says of a task. media_bytes: size of each file's soft tokens; experts: names of
    the expert slots (empty for a dense model); note: what of the prompt was left out for want of room."""

    prompt_tokens: int
    media_bytes: tuple[int, ...]
    experts: tuple[str, ...]
    note: str = ""


# One message of a language model.
Told = tuple[Started | Output, ...]


class MediaRefused(Exception):
    """A media file that can't be used, with the reason in one line (the request part included)."""
