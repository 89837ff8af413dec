"""A cluster's API server: connect, read, apply, delete, watch, logs. Documents are plain dictionaries.

It stands on the ``kubernetes`` package for credentials and transport. Its typed methods know no custom resources, so
paths come from the server's own discovery, and every kind is treated alike.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import urllib3
import yaml
from kubernetes import config as kubernetes_config
from kubernetes.client import ApiClient, Configuration
from kubernetes.client.exceptions import ApiException
from kubernetes.config.kube_config import KUBE_CONFIG_DEFAULT_LOCATION
from kubernetes.watch.watch import iter_resp_lines

from unimoe_ray.errors import UnimoeError, UsageError
from unimoe_ray.kuberay.documents import Document, Ref
from unimoe_ray.kuberay.errors import ApiError, Expired, Unreachable, api_error
from unimoe_ray.kuberay.redact import Redactor

FIELD_MANAGER = "unimoe"
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
APPLY = "application/apply-patch+yaml"
PAGE = 500


@dataclass(frozen=True)
class Patience:
    """How often a request is sent, and how long its answer and the pauses between may take, in seconds."""

    attempts: int = 4
    connect_s: float = 5.0
    answer_s: float = 30.0
    first_pause_s: float = 0.5
    longest_pause_s: float = 20.0

    def pause(self, attempt: int, retry_after: str | None = None) -> float:
        """What the server asks for, or twice as long as last time, with jitter so that many clients spread."""
        if retry_after and retry_after.isdigit():
            return min(float(retry_after), self.longest_pause_s)
        return min(self.first_pause_s * 2 ** (attempt - 1), self.longest_pause_s) * random.uniform(0.75, 1.25)


@dataclass(frozen=True)
class Resource:
    """Where a kind lives on the server: ``/apis/ray.io/v1``, ``rayjobs``."""

    prefix: str
    plural: str
    namespaced: bool


@dataclass(frozen=True)
class Event:
    """One event of a watch: ADDED, MODIFIED, DELETED or BOOKMARK."""

    type: str
    object: Document

    @property
    def version(self) -> str:
        return self.object["metadata"]["resourceVersion"]


def connect(
    kubeconfig: Path | None = None,
    context: str | None = None,
    namespace: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    patience: Patience | None = None,
) -> Cluster:
    """The cluster of a kubeconfig (given, KUBECONFIG, ~/.kube/config) or else the one that this pod runs in.

    ``say`` gets a line for every request that is tried again. Raises UsageError for a kubeconfig or context that is
    not there. Nothing is sent yet.
    """
    files = str(kubeconfig) if kubeconfig else os.environ.get("KUBECONFIG") or KUBE_CONFIG_DEFAULT_LOCATION
    found = any(Path(file).expanduser().is_file() for file in files.split(os.pathsep))
    settings = Configuration()
    if kubeconfig is None and not found and "KUBERNETES_SERVICE_HOST" in os.environ:
        if context is not None:
            raise UsageError(f"--context {context}: inside a pod there is no kubeconfig that could name one")
        where, default = "the API server of this cluster", _load_in_cluster(settings)
    elif found:
        where, default = _load_kubeconfig(settings, files, context)
    else:
        raise UsageError(f"no kubeconfig at {files}: set KUBECONFIG or --kubeconfig to one")
    settings.retries = False  # Ours know what may be sent twice.
    redactor = Redactor()
    for key in (*settings.api_key.values(), settings.password):
        if key:
            redactor.learn(key.split()[-1])
    return Cluster(ApiClient(settings), where, namespace or default, redactor, say, patience or Patience())


def _load_in_cluster(settings: Configuration) -> str:
    """Returns the pod's namespace."""
    try:
        kubernetes_config.load_incluster_config(settings)
    except kubernetes_config.ConfigException as error:
        raise UnimoeError(f"this pod's service account cannot be used: {error}") from None
    file = SERVICE_ACCOUNT / "namespace"
    return file.read_text(encoding="utf-8").strip() if file.is_file() else "default"


def _load_kubeconfig(settings: Configuration, files: str, context: str | None) -> tuple[str, str]:
    """Returns words for the server, and the namespace of the context."""
    try:
        known, current = _contexts(files)
        name = context or current
        allowed = ", ".join(sorted(known)) or "(it has none)"
        if not name:
            raise UsageError(f"{files} has no current context: name one with --context; allowed: {allowed}")
        if name not in known:
            raise UsageError(f"--context {name}: no such context in {files}; allowed: {allowed}")
        kubernetes_config.load_kube_config(files, name, settings, persist_config=False)
    except (kubernetes_config.ConfigException, yaml.YAMLError) as error:
        raise UsageError(f"{files}: {' '.join(str(error).split())}") from None
    return f"the API server of context {name!r} ({settings.host})", known[name].get("namespace") or "default"


def _contexts(files: str) -> tuple[dict[str, Document], str]:
    """Contexts by name, and the current one; the first file that says something wins, as with kubectl."""
    known: dict[str, Document] = {}
    current = ""
    for file in files.split(os.pathsep):
        path = Path(file).expanduser()
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(content, dict):
            raise UsageError(f"{file}: not a kubeconfig")
        known = {entry["name"]: entry["context"] for entry in content.get("contexts") or []} | known
        current = current or content.get("current-context") or ""
    return known, current


class Cluster:
    """One API server. Every error is one line (ApiError, Unreachable) without secrets.

    ``namespace`` is that of documents that name none. Requests are sent again after 429, 5xx, lost connections,
    timeouts and conflicts that a second try may cure; all of ours may be sent twice.
    """

    def __init__(
        self,
        api: ApiClient,
        where: str,
        namespace: str,
        redactor: Redactor,
        say: Callable[[str], None],
        patience: Patience,
    ):
        self.api, self.where, self.namespace = api, where, namespace
        self.redactor, self.say, self.patience = redactor, say, patience
        self._discovered: dict[str, dict[str, Resource]] = {}

    # Reading

    def get(self, ref: Ref) -> Document | None:
        """None if there is no such object."""
        try:
            return self._json("GET", self._path(ref), what=f"read {ref}")
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def list_objects(self, ref: Ref, labels: str = "", fields: str = "") -> tuple[list[Document], str]:
        """All objects of the ref's kind and namespace (or the one that it names), and the version to watch from.

        labels, fields: selectors, such as ``ray.io/cluster=x``.
        """
        named = f"metadata.name={ref.name}" if ref.name else ""
        query = [("labelSelector", labels), ("fieldSelector", ",".join(filter(None, (named, fields)))), ("limit", PAGE)]
        items: list[Document] = []
        more = ""
        while True:
            page = self._json("GET", self._path(ref, collection=True), [*query, ("continue", more)], what=f"list {ref}")
            items += [{"apiVersion": ref.api_version, "kind": ref.kind} | item for item in page["items"]]
            more = page["metadata"].get("continue") or ""
            if not more:
                return items, page["metadata"].get("resourceVersion", "")

    def watch(self, ref: Ref, version: str, seconds: float) -> Iterator[Event]:
        """Changes of the object that ``ref`` names after ``version``, for at most so many seconds.

        Raises Expired when the server no longer has that version, Unreachable when the connection is lost.
        """
        query = [
            ("watch", "true"),
            ("fieldSelector", f"metadata.name={ref.name}"),
            ("resourceVersion", version),
            ("allowWatchBookmarks", "true"),
            ("timeoutSeconds", max(1, round(seconds))),
        ]
        wait_s = seconds + self.patience.connect_s
        for line in self._lines(self._path(ref, collection=True), query, f"watch {ref}", wait_s):
            event = json.loads(line)
            if event["type"] == "ERROR":
                status = event["object"]
                raise self._error(int(status.get("code") or 500), json.dumps(status), f"watch {ref}")
            yield Event(event["type"], event["object"])

    def logs(
        self, pod: Ref, container: str | None = None, tail: int | None = None, previous: bool = False
    ) -> list[str]:
        """Log lines of a pod's container so far; ``previous``: of the one before the last restart."""
        query = [("container", container), ("tailLines", tail), ("previous", "true" if previous else None)]
        response = self._send("GET", f"{self._path(pod)}/log", query, what=f"read the log of {pod}")
        return self.redactor.text(response.data.decode(errors="replace")).splitlines()

    def follow(self, pod: Ref, container: str | None, since: str, silence_s: float) -> Iterator[tuple[str, str]]:
        """(time, line) of a running container from the time ``since`` (empty: its start) on, until the log ends."""
        query = [("container", container), ("follow", "true"), ("timestamps", "true"), ("sinceTime", since)]
        for line in self._lines(f"{self._path(pod)}/log", query, f"follow the log of {pod}", silence_s):
            stamp, _, text = line.partition(" ")
            yield stamp, self.redactor.text(text)

    # Writing

    def apply(self, document: Document, force: bool = False, dry_run: bool = False) -> Document:
        """Server-side apply as field manager ``unimoe``, with strict checking of fields; returns what is stored then.

        ``force`` takes fields over from other managers. Raises ApiError, with ``conflicts`` set if others own fields.
        """
        self.redactor.learn_document(document)
        ref = Ref.of(document, self.namespace)
        query = [
            ("fieldManager", FIELD_MANAGER),
            ("fieldValidation", "Strict"),
            ("force", "true" if force else "false"),
        ]
        if dry_run:
            query.append(("dryRun", "All"))
        return self._json("PATCH", self._path(ref), query, document, what=f"apply {ref}")

    def delete(self, ref: Ref) -> bool:
        """Begin to delete an object and what it owns; False if there was none."""
        body = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
        try:
            self._json("DELETE", self._path(ref), body=body, what=f"delete {ref}")
        except ApiError as error:
            if error.status == 404:
                return False
            raise
        return True

    # Paths

    def resource(self, ref: Ref) -> Resource:
        """Where the server keeps this kind. Raises ApiError (404) if it does not know the kind."""
        if ref.api_version not in self._discovered:
            prefix = "/api/v1" if ref.api_version == "v1" else f"/apis/{ref.api_version}"
            try:
                found = self._json("GET", prefix, what=f"look up {ref.api_version}")["resources"]
            except ApiError as error:
                if error.status != 404:
                    raise
                found = []
            self._discovered[ref.api_version] = {
                entry["kind"]: Resource(prefix, entry["name"], entry["namespaced"])
                for entry in found
                if "/" not in entry["name"]
            }
        try:
            return self._discovered[ref.api_version][ref.kind]
        except KeyError:
            raise ApiError(f"{self.where} does not know the kind {ref.kind} ({ref.api_version})", 404) from None

    def _path(self, ref: Ref, collection: bool = False) -> str:
        resource = self.resource(ref)
        within = f"/namespaces/{quote(ref.namespace, safe='')}" if resource.namespaced else ""
        return f"{resource.prefix}{within}/{resource.plural}" + ("" if collection else f"/{quote(ref.name, safe='')}")

    # Requests

    def _json(
        self, method: str, path: str, query: list[tuple[str, Any]] | None = None, body: Any = None, what: str = ""
    ):
        return json.loads(self._send(method, path, query or [], body, what).data)

    def _lines(self, path: str, query: list[tuple[str, Any]], what: str, silence_s: float) -> Iterator[str]:
        """Lines as they come; Unreachable after ``silence_s`` without one or when the connection breaks."""
        try:
            response = self._open("GET", path, query, None, (self.patience.connect_s, silence_s), what)
            try:
                if response.status >= 300:
                    raise self._error(response.status, response.data.decode(errors="replace"), what)
                yield from filter(None, iter_resp_lines(response))
            finally:
                response.close()
                response.release_conn()
        except urllib3.exceptions.HTTPError as error:
            raise Unreachable(f"{what}: {self.where} ended the connection ({_cause(error)})") from None

    def _send(self, method: str, path: str, query: list, body: Any = None, what: str = "") -> urllib3.HTTPResponse:
        """One request, sent again where that may help. The answer is read and a success."""
        for attempt in range(1, self.patience.attempts + 1):
            last = attempt == self.patience.attempts
            retry_after = None
            try:
                response = self._open(
                    method, path, query, body, (self.patience.connect_s, self.patience.answer_s), what
                )
                _ = response.data  # Reads it all, so that the connection can be used again.
            except urllib3.exceptions.HTTPError as error:
                failure: UnimoeError = Unreachable(f"{what}: no full answer from {self.where} ({_cause(error)})")
            except _Refused as error:
                raise Unreachable(str(error)) from None
            else:
                if response.status < 300:
                    return response
                failure = self._error(response.status, response.data.decode(errors="replace"), what)
                retry_after = response.headers.get("Retry-After")
                if not _worth_another_try(failure):
                    raise failure
            if last:
                raise failure
            pause = self.patience.pause(attempt, retry_after)
            self.say(f"{failure}; again in {pause:.1f} s ({attempt + 1} of {self.patience.attempts})")
            time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _open(self, method, path, query, body, timeout: tuple[float, float], what: str) -> urllib3.HTTPResponse:
        headers = {"Accept": "application/json", "Content-Type": APPLY if method == "PATCH" else "application/json"}
        given = [(key, str(value)) for key, value in query if value not in (None, "")]
        try:
            request = self.api.param_serialize(method, path, {}, given, headers, body, auth_settings=["BearerToken"])
            return self.api.call_api(*request, _request_timeout=timeout).response
        except ApiException as error:  # What the package makes of a failed TLS handshake
            raise _Refused(f"{self.where} cannot be trusted: {' '.join(str(error.reason).split())}") from None
        except urllib3.exceptions.SSLError as error:
            raise _Refused(f"{self.where} cannot be trusted: {_cause(error)}") from None
        except (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ProxyError) as error:
            raise _Refused(f"{self.where} cannot be reached: {_cause(error)}") from None

    def _error(self, status: int, text: str, what: str) -> ApiError:
        error = api_error(status, text, what, self.where)
        error.args = (self.redactor.text(str(error)),)
        return error


class _Refused(Unreachable):
    """Nobody listens there, or not the right one: sending again at once would not help."""


def _worth_another_try(error: ApiError) -> bool:
    if error.status == 409:  # Written between reading and writing, or still being deleted
        return not error.conflicts  # A manager's fields stay its own.
    return error.status == 429 or error.status >= 500


def _cause(error: Exception) -> str:
    """The last words of urllib3's chain: ``Connection refused``."""
    if isinstance(error, urllib3.exceptions.TimeoutError) and not isinstance(
        error,
        urllib3.exceptions.NewConnectionError,  # A subclass that has a cause of its own
    ):
        return "timed out"
    text = str(error.args[-1] if error.args else error)
    return re.sub(r"^\[Errno -?\d+\] ", "", text.rsplit(": ", 1)[-1].strip("()'\" ")) or type(error).__name__


__all__ = ["ApiError", "Cluster", "Event", "Expired", "FIELD_MANAGER", "Patience", "Resource", "Unreachable", "connect"]
