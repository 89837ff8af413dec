"""Who asks: API keys, and what each of them may take."""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fastapi import Request

from serve.errors import ApiError
from unimoe_ray.config.serving import KeyClassConfig, ServingConfig
from unimoe_ray.errors import UnimoeError


@dataclass(frozen=True)
class Caller:
    """name: of the key, never the key; it is whose limits are counted together."""

    name: str = ""
    rights: KeyClassConfig = field(default_factory=KeyClassConfig)

    @property
    def is_limited(self) -> bool:
        return self.rights.requests_per_minute is not None or self.rights.tokens_per_minute is not None


class ApiKeys:
    """Keys of the configuration and of its file (one per line, class ``default``); compared by hash in constant time.
    Without any anyone may ask. Raises UnimoeError for a file that can't be read or holds no key."""

    def __init__(self, config: ServingConfig):
        classes = {"default": KeyClassConfig()} | config.key_classes
        self._known = [(bytes.fromhex(key.sha256), Caller(key.name, classes[key.key_class])) for key in config.keys]
        if config.api_keys_file is not None:
            hashes = map(_digest, _read(config.api_keys_file))
            self._known += [(known, Caller(f"key {known.hex()[:8]}", classes["default"])) for known in hashes]

    async def check(self, request: Request) -> Caller:
        """Raises ApiError 401. Waits for nothing: if it were not async, FastAPI would take a thread for it."""
        if not self._known:
            return Caller()
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = _digest(key.strip().encode("latin-1"))  # The bytes that came: headers are decoded so.
        matches = [caller for known, caller in self._known if hmac.compare_digest(given, known)]
        if scheme.lower() != "bearer" or not matches:
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        return matches[0]


def _read(path: str) -> list[bytes]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UnimoeError(f"serving.api_keys_file {path}: {error}") from None
    keys = [line.strip().encode() for line in lines]
    keys = [key for key in keys if key and not key.startswith(b"#")]
    if not keys:
        raise UnimoeError(f"serving.api_keys_file {path}: holds no key (one per line)")
    return keys


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Limits(Protocol):
    """What callers have taken, over all ingress replicas."""

    async def take(self, caller: Caller) -> float:
        """Count a request; or, if the caller must wait before it may send one, for how many seconds."""

    async def spend(self, caller: Caller, tokens: int) -> None: ...


class Bucket:
    """Holds a minute's worth at most and fills up at that rate. It may be overdrawn: the cost of an answer is known
    only at its end, and the next request waits until that is paid."""

    def __init__(self, per_minute: int, now: float):
        self.per_minute, self.level, self._at = per_minute, float(per_minute), now

    def wait(self, needed: float, now: float) -> float:
        """Seconds until ``needed`` can be taken; 0 when it is there."""
        self.level = min(self.per_minute, self.level + (now - self._at) * self.per_minute / 60)
        self._at = now
        return max(0.0, (needed - self.level) * 60 / self.per_minute)


class Buckets:
    """``Limits`` of one process. Those of a key begin anew when its rights change, or with this object."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._of: dict[tuple[str, str], Bucket] = {}

    async def take(self, caller: Caller) -> float:
        requests = self._bucket(caller, "requests", caller.rights.requests_per_minute)
        tokens = self._bucket(caller, "tokens", caller.rights.tokens_per_minute)
        wait = max((bucket.wait(1.0, self._clock()) for bucket in (requests, tokens) if bucket), default=0.0)
        if requests and not wait:
            requests.level -= 1
        return wait

    async def spend(self, caller: Caller, tokens: int) -> None:
        if bucket := self._bucket(caller, "tokens", caller.rights.tokens_per_minute):
            bucket.level -= tokens

    def _bucket(self, caller: Caller, what: str, per_minute: int | None) -> Bucket | None:
        if per_minute is None:
            return None
        bucket = self._of.get((caller.name, what))
        if bucket is None or bucket.per_minute != per_minute:
            bucket = self._of[caller.name, what] = Bucket(per_minute, self._clock())
        return bucket


async def admit(limits: Limits, caller: Caller) -> None:
    """Raises ApiError 429."""
    if caller.is_limited and (wait := await limits.take(caller)):
        message = f"this API key's limit is reached; try again in {math.ceil(wait)} s"
        raise ApiError(429, message, code="rate_limit_exceeded", retry_after=math.ceil(wait))
