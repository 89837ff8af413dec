"""Wait for an object: driven by a watch that survives lost connections and expired versions, with a time limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from unimoe_ray.errors import UnimoeError
from unimoe_ray.kuberay.client import Cluster
from unimoe_ray.kuberay.conditions import Check
from unimoe_ray.kuberay.documents import Document, Ref
from unimoe_ray.kuberay.errors import ApiError, Expired, Unreachable

TICK_S = 10.0
LONGEST_PAUSE_S = 10.0


class WaitFailed(UnimoeError):
    """What was waited for will not happen."""


class WaitTimeout(UnimoeError):
    """It has not happened in time."""


def wait(
    cluster: Cluster,
    ref: Ref,
    check: Check,
    limit_s: float,
    report: Callable[[str, Document | None], None] = lambda line, document: None,
    tick_s: float = TICK_S,
) -> Document:
    """The object once ``check`` says done.

    ``report`` gets the status in words, and the object, at every change and every ``tick_s`` seconds. Raises
    WaitFailed if the check says failed or the object is not there (any more), WaitTimeout after ``limit_s`` seconds,
    ApiError for an answer that will stay the same (credentials, rights).
    """
    line, last = "nothing known yet", None

    def troubled(problem: str) -> None:
        report(f"{line}; {problem}", last)

    for document in _states(cluster, ref, limit_s, tick_s, troubled):
        if document is None:
            raise WaitFailed(f"{ref} {'was deleted' if last else f'not found in namespace {ref.namespace}'}")
        verdict, last = check(document), document
        line = cluster.redactor.text(verdict.line)
        report(line, document)
        if verdict.state == "done":
            return document
        if verdict.state == "failed":
            raise WaitFailed(f"{ref} {line}")
    raise WaitTimeout(f"{ref} after {limit_s:g} s: {line}")


def wait_deleted(
    cluster: Cluster,
    ref: Ref,
    limit_s: float,
    report: Callable[[str, Document | None], None] = lambda line, document: None,
    tick_s: float = TICK_S,
) -> None:
    """Returns once the object is gone. Raises WaitTimeout, naming what holds it."""
    line = "still there"

    def troubled(problem: str) -> None:
        report(f"{line}; {problem}", None)

    for document in _states(cluster, ref, limit_s, tick_s, troubled):
        if document is None:
            return
        holders = document["metadata"].get("finalizers") or []
        line = "still there" + (f", held by {', '.join(holders)}" if holders else "")
        report(line, document)
    raise WaitTimeout(f"{ref} after {limit_s:g} s: {line}")


def _states(
    cluster: Cluster, ref: Ref, limit_s: float, tick_s: float, troubled: Callable[[str], None]
) -> Iterator[Document | None]:
    """The object now, at every change, and at every tick (None: it is not there), until the time is over.

    A version that has expired is listed again; a lost connection goes on from the last version seen.
    """
    deadline = time.monotonic() + limit_s
    document, version = None, ""
    losses = 0
    while (left := deadline - time.monotonic()) > 0:
        try:
            if not version:
                found, version = cluster.list_objects(ref)
                document = found[0] if found else None
            yield document
            for event in cluster.watch(ref, version, min(tick_s, left)):
                version, losses = event.version, 0
                if event.type != "BOOKMARK":
                    document = None if event.type == "DELETED" else event.object
                    yield document
                if time.monotonic() > deadline:
                    return
        except Expired:
            version = ""
            time.sleep(min(cluster.patience.first_pause_s, max(0.0, deadline - time.monotonic())))
        except (Unreachable, ApiError) as error:
            if isinstance(error, ApiError) and error.status < 500 and error.status != 429:
                raise
            losses += 1
            troubled(f"{error}; goes on waiting")
            time.sleep(max(0.0, min(cluster.patience.pause(losses), LONGEST_PAUSE_S, deadline - time.monotonic())))
