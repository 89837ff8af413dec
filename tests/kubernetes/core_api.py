"""A small API server for core kinds, over real HTTP, with scripted failures; it is the stand-in for what runs pods.

It keeps documents, answers discovery, lists, watches (resumable, with 410 for what it has forgotten), server-side
apply (owners by leaf; lists are leaves), deletes with finalizers, and pod logs. With ``upstream`` it is a front: ray.io
goes to the real server of custom resources, all else stays here, as one cluster. It judges no fields.
"""

from __future__ import annotations

import base64
import copy
import http.client
import itertools
import json
import re
import socket
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import yaml

# api version: {plural: (kind, namespaced)}
SERVED = {
    "v1": {
        "namespaces": ("Namespace", False),
        "pods": ("Pod", True),
        "secrets": ("Secret", True),
        "configmaps": ("ConfigMap", True),
        "services": ("Service", True),
        "serviceaccounts": ("ServiceAccount", True),
        "persistentvolumeclaims": ("PersistentVolumeClaim", True),
        "events": ("Event", True),
    },
    "apps/v1": {"deployments": ("Deployment", True), "statefulsets": ("StatefulSet", True)},
    "batch/v1": {"jobs": ("Job", True)},
    "networking.k8s.io/v1": {"networkpolicies": ("NetworkPolicy", True)},
    "policy/v1": {"poddisruptionbudgets": ("PodDisruptionBudget", True)},
    "rbac.authorization.k8s.io/v1": {"roles": ("Role", True), "rolebindings": ("RoleBinding", True)},
    "scheduling.k8s.io/v1": {"priorityclasses": ("PriorityClass", False)},
}
# What a cluster has only with the operators that define it.
PROMETHEUS = {
    "monitoring.coreos.com/v1": {"podmonitors": ("PodMonitor", True), "prometheusrules": ("PrometheusRule", True)}
}
KUEUE = {
    f"kueue.x-k8s.io/{version}": {
        "resourceflavors": ("ResourceFlavor", False),
        "clusterqueues": ("ClusterQueue", False),
        "localqueues": ("LocalQueue", True),
        "workloads": ("Workload", True),
    }
    for version in ("v1beta1", "v1beta2")
}
RAY = "/apis/ray.io"
Key = tuple[str, str, str, str]  # api version, plural, namespace, name


@dataclass
class Failure:
    """What happens instead of an answer to the next ``times`` requests that match."""

    method: str
    path: re.Pattern[str]
    act: Callable[[_Handler], None]
    times: int


@dataclass
class CoreApi:
    """The server while it runs. ``requests``: "METHOD path?query" of all that came, in order."""

    url: str = ""
    served: dict[str, dict[str, tuple[str, bool]]] = field(default_factory=lambda: dict(SERVED))
    upstream: Upstream | None = None
    token: str = ""
    requests: list[str] = field(default_factory=list)
    logs: dict[tuple[str, str, bool], list[str]] = field(default_factory=dict)
    cut_watch_after: int | None = None

    def __post_init__(self) -> None:
        self._objects: dict[Key, dict[str, Any]] = {}
        self._owners: dict[Key, dict[tuple[str, ...], set[str]]] = {}
        self._history: list[tuple[int, str, Key, dict[str, Any]]] = []
        self._forgotten = 0
        self._versions = itertools.count(1)
        self._failures: list[Failure] = []
        self.changed = threading.Condition()
        self.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default"}})

    # Played by a test: the kubelet, the scheduler, the operator

    def put(self, document: dict[str, Any]) -> dict[str, Any]:
        """Store a document as it is, status included, as a controller would."""
        return self._store(self.key_of(document), copy.deepcopy(document))

    def get(self, document: dict[str, Any]) -> dict[str, Any] | None:
        return self._objects.get(self.key_of(document))

    def remove(self, document: dict[str, Any]) -> None:
        self._delete(self.key_of(document))

    def pod_log(self, pod: str, container: str, lines: list[str], previous: bool = False) -> None:
        self.logs[pod, container, previous] = lines

    def forget(self) -> None:
        """Compaction: watches from before now get 410."""
        with self.changed:
            self._forgotten = next(self._versions)

    def fail(
        self, method: str, path: str, status: int, message: str = "", times: int = 1, reason: str = "", **headers: str
    ) -> None:
        """Answer with an error. ``path``: regular expression; headers: Retry_After="1"."""
        body = {"kind": "Status", "status": "Failure", "code": status, "message": message, "reason": reason}
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        self._failures.append(Failure(method, re.compile(path), lambda h: h.answer(status, body, named), times))

    def hang(self, method: str, path: str, seconds: float, times: int = 1) -> None:
        """Say nothing for so long, then close the connection."""

        def act(handler: _Handler) -> None:
            time.sleep(seconds)
            handler.drop()

        self._failures.append(Failure(method, re.compile(path), act, times))

    def drop(self, method: str, path: str, times: int = 1) -> None:
        """Close the connection without an answer."""
        self._failures.append(Failure(method, re.compile(path), _Handler.drop, times))

    def kubeconfig(self, file: Path, namespace: str = "default", **user: str) -> Path:
        name = "stub"
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": name,
            "clusters": [{"name": name, "cluster": {"server": self.url}}],
            "users": [{"name": name, "user": user or ({"token": self.token} if self.token else {})}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": name, "namespace": namespace}}],
        }
        file.write_text(yaml.safe_dump(document), encoding="utf-8")
        return file

    # The store

    def key_of(self, document: dict[str, Any]) -> Key:
        kinds = self.served[document["apiVersion"]]
        plural, namespaced = next((plural, kind[1]) for plural, kind in kinds.items() if kind[0] == document["kind"])
        metadata = document["metadata"]
        return (
            document["apiVersion"],
            plural,
            metadata.get("namespace", "default") if namespaced else "",
            metadata["name"],
        )

    def _store(self, key: Key, document: dict[str, Any]) -> dict[str, Any]:
        with self.changed:
            old = self._objects.get(key)
            metadata = document["metadata"]
            if key[2]:
                metadata["namespace"] = key[2]
            kept = (old or {}).get("metadata", {})
            metadata["uid"] = kept.get("uid") or metadata.get("uid") or str(uuid.uuid4())
            metadata["creationTimestamp"] = kept.get("creationTimestamp") or metadata.get("creationTimestamp") or now()
            generation = kept.get("generation", 0)
            metadata["generation"] = generation + (not old or old.get("spec") != document.get("spec"))
            if document["kind"] == "Namespace":
                document.setdefault("status", {"phase": "Active"})
            if metadata.get("deletionTimestamp") and not metadata.get("finalizers"):
                return self._delete(key)
            version = next(self._versions)
            metadata["resourceVersion"] = str(version)
            self._objects[key] = document
            self._history.append((version, "MODIFIED" if old else "ADDED", key, copy.deepcopy(document)))
            self.changed.notify_all()
            return copy.deepcopy(document)

    def _delete(self, key: Key) -> dict[str, Any]:
        with self.changed:
            document = self._objects[key]
            metadata = document["metadata"]
            if metadata.get("finalizers") and not metadata.get("deletionTimestamp"):
                return self._store(key, document | {"metadata": metadata | {"deletionTimestamp": now()}})
            del self._objects[key]
            self._owners.pop(key, None)
            version = next(self._versions)
            document = document | {"metadata": metadata | {"resourceVersion": str(version)}}
            self._history.append((version, "DELETED", key, document))
            if key[1] == "namespaces":
                for inside in [other for other in self._objects if other[2] == key[3]]:
                    self._delete(inside)
            self.changed.notify_all()
            return document

    def _apply(
        self, key: Key, applied: dict[str, Any], manager: str, force: bool, dry_run: bool
    ) -> tuple[int, dict[str, Any]]:
        with self.changed:
            old = self._objects.get(key)
            if "stringData" in applied:
                encoded = {k: base64.b64encode(v.encode()).decode() for k, v in applied["stringData"].items()}
                applied = {k: v for k, v in applied.items() if k != "stringData"}
                applied["data"] = applied.get("data", {}) | encoded
            new = copy.deepcopy(old) or {key: applied[key] for key in ("apiVersion", "kind")} | {"metadata": {}}
            owners = copy.deepcopy(self._owners.get(key, {}))
            wanted = dict(_leaves(applied))
            conflicts = [
                (path, owners[path] - {manager})
                for path, value in wanted.items()
                if owners.get(path, set()) - {manager} and _at(new, path) != value
            ]
            if conflicts and not force:
                causes = [
                    {
                        "reason": "FieldManagerConflict",
                        "message": f'conflict with "{sorted(others)[0]}"',
                        "field": "." + ".".join(path),
                    }
                    for path, others in conflicts
                ]
                return 409, {
                    "kind": "Status",
                    "code": 409,
                    "reason": "Conflict",
                    "message": f"Apply failed with {len(causes)} conflict(s)",
                    "details": {"causes": causes},
                }
            for path, value in wanted.items():
                same = _at(new, path) == value
                _put_at(new, path, value)
                owners[path] = owners.get(path, set()) | {manager} if same else {manager}
            for path in [path for path, who in owners.items() if manager in who and path not in wanted]:
                owners[path] -= {manager}
                if not owners[path]:
                    del owners[path]
                    _remove_at(new, path)
            if dry_run:
                new["metadata"].setdefault("uid", "dry-run")
                return 200 if old else 201, new
            self._owners[key] = owners
            if old == new:
                return 200, old
            return 200 if old else 201, self._store(key, new)

    def own(self, document: dict[str, Any], manager: str) -> None:
        """Let another manager apply a document, by force: it then owns those fields."""
        self._apply(self.key_of(document), copy.deepcopy(document), manager, True, False)

    # Requests

    def handle(self, handler: _Handler) -> None:
        method, target = handler.command, urlsplit(handler.path)
        path, query = target.path, dict(parse_qsl(target.query))
        length = int(handler.headers.get("Content-Length") or 0)
        body = handler.rfile.read(length) if length else b""
        self.requests.append(f"{method} {handler.path}")
        for failure in self._failures:
            if failure.times and failure.method == method and failure.path.search(handler.path):
                failure.times -= 1
                failure.act(handler)
                return
        if self.token and handler.headers.get("Authorization") != f"Bearer {self.token}":
            handler.answer(401, {"kind": "Status", "code": 401, "reason": "Unauthorized", "message": "Unauthorized"})
            return
        if path.startswith(RAY) and self.upstream:
            within = re.search(r"/namespaces/([^/]+)", path)
            if within and method in ("POST", "PATCH", "PUT") and not self._has_namespace(within[1]):
                handler.answer(404, _missing_namespace(within[1]))
                return
            self.upstream.forward(handler, body)
            return
        self._route(handler, method, path, query, body)

    def _has_namespace(self, name: str) -> bool:
        return ("v1", "namespaces", "", name) in self._objects

    def _route(self, handler: _Handler, method: str, path: str, query: dict[str, str], body: bytes) -> None:
        if method == "GET" and path == "/api":
            handler.answer(200, {"kind": "APIVersions", "versions": ["v1"]})
            return
        if method == "GET" and path == "/apis":
            handler.answer(200, self._groups())
            return
        match = re.fullmatch(r"/(?:api|apis)/(?P<version>v1|[\w.-]+/\w+)(?P<rest>/.*)?", path)
        kinds = self.served.get(match["version"]) if match else None
        if kinds is None:
            handler.answer(404, {"kind": "Status", "code": 404, "message": "the server could not find the resource"})
            return
        if not match["rest"]:
            resources = [
                {"name": plural, "kind": kind, "namespaced": namespaced, "verbs": []}
                for plural, (kind, namespaced) in kinds.items()
            ]
            handler.answer(200, {"kind": "APIResourceList", "groupVersion": match["version"], "resources": resources})
            return
        parts = match["rest"].strip("/").split("/")
        namespace = parts[1] if parts[0] == "namespaces" and len(parts) > 2 else ""
        plural, *rest = parts[2:] if namespace else parts
        name, sub = (rest + ["", ""])[:2]
        key = (match["version"], plural, namespace, name)
        if sub == "log":
            self._send_log(handler, key, query)
        elif method == "GET" and query.get("watch") == "true":
            self._send_watch(handler, key, query)
        elif method == "GET" and not name:
            handler.answer(200, self._list(key, query))
        elif method == "PATCH":
            if namespace and not self._has_namespace(namespace):
                handler.answer(404, _missing_namespace(namespace))
                return
            force, dry_run = query.get("force") == "true", query.get("dryRun") == "All"
            handler.answer(*self._apply(key, json.loads(body), query["fieldManager"], force, dry_run))
        elif key not in self._objects:
            handler.answer(
                404,
                {"kind": "Status", "code": 404, "reason": "NotFound", "message": f'{plural} "{name}" not found'},
            )
        elif method == "GET":
            handler.answer(200, self._objects[key])
        elif method == "DELETE":
            handler.answer(200, self._delete(key))
        else:
            handler.answer(405, {"kind": "Status", "code": 405, "message": f"{method} is not played here"})

    def _groups(self) -> dict[str, Any]:
        versions = [version for version in (*self.served, *(["ray.io/v1"] if self.upstream else [])) if "/" in version]
        groups = [
            {
                "name": version.split("/")[0],
                "versions": [{"groupVersion": version, "version": version.split("/")[1]}],
                "preferredVersion": {"groupVersion": version, "version": version.split("/")[1]},
            }
            for version in versions
        ]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}

    def _list(self, key: Key, query: dict[str, str]) -> dict[str, Any]:
        with self.changed:
            chosen = [d for k, d in sorted(self._objects.items()) if k[:3] == key[:3] and _selected(d, query)]
            start = int(query.get("continue", 0))
            page = chosen[start : start + int(query.get("limit", len(chosen) or 1))]
            metadata = {"resourceVersion": str(next(self._versions))}
            if start + len(page) < len(chosen):
                metadata["continue"] = str(start + len(page))
            items = [{k: v for k, v in d.items() if k not in ("apiVersion", "kind")} for d in page]  # As the real one.
            return {"kind": "List", "metadata": metadata, "items": items}

    def _send_watch(self, handler: _Handler, key: Key, query: dict[str, str]) -> None:
        seen = int(query.get("resourceVersion", 0))
        end = time.monotonic() + float(query.get("timeoutSeconds", 30))
        handler.begin()
        if seen < self._forgotten:
            gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": f"too old resource version: {seen}"}
            handler.send_line({"type": "ERROR", "object": gone})
            handler.finish_chunks()
            return
        sent = 0
        while time.monotonic() < end:
            with self.changed:
                news = [entry for entry in self._history if entry[0] > seen]
                if not news:
                    self.changed.wait(min(0.2, max(0.0, end - time.monotonic())))
            for version, kind, changed, document in news:
                seen = version
                if changed[:3] == key[:3] and _selected(document, query):
                    handler.send_line({"type": kind, "object": document})
                    sent += 1
                    if self.cut_watch_after is not None and sent >= self.cut_watch_after:
                        self.cut_watch_after = None
                        handler.drop()
                        return
        handler.finish_chunks()

    def _send_log(self, handler: _Handler, key: Key, query: dict[str, str]) -> None:
        pod = self._objects.get((*key[:1], "pods", *key[2:]))
        container = query.get("container", "")
        lines = self.logs.get((key[3], container, query.get("previous") == "true"))
        if pod is None or lines is None:
            message = f'previous terminated container "{container}" in pod "{key[3]}" not found'
            handler.answer(400, {"kind": "Status", "code": 400, "reason": "BadRequest", "message": message})
            return
        if query.get("timestamps") == "true":
            lines = [line for line in lines if line.split(" ")[0][:19] >= query.get("sinceTime", "")[:19]]
        if "tailLines" in query:
            lines = lines[-int(query["tailLines"]) :]
        handler.begin("text/plain")
        for line in lines:
            if line == CUT:
                self.logs[key[3], container, False] = [
                    text for text in self.logs[key[3], container, False] if text != CUT
                ]
                handler.drop()
                return
            handler.send_line(line)
        handler.finish_chunks()


CUT = "(the connection is lost here)"


class Upstream:
    """The real API server behind a front, by its kubeconfig with a client certificate."""

    def __init__(self, kubeconfig: Path):
        document = yaml.safe_load(kubeconfig.read_text(encoding="utf-8"))
        cluster, user = document["clusters"][0]["cluster"], document["users"][0]["user"]
        self.host = urlsplit(cluster["server"]).netloc
        authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
        self.tls = ssl.create_default_context(cadata=authority)
        files = []
        for part in ("client-certificate-data", "client-key-data"):
            file = kubeconfig.parent / f"{part}.pem"
            file.write_bytes(base64.b64decode(user[part]))
            files.append(file)
        self.tls.load_cert_chain(*files)

    def forward(self, handler: _Handler, body: bytes) -> None:
        """Send a request on, and its answer back as it comes."""
        connection = http.client.HTTPSConnection(self.host, context=self.tls, timeout=60)
        headers = {k: v for k, v in handler.headers.items() if k in ("Content-Type", "Accept")}
        connection.request(handler.command, handler.path, body or None, headers)
        answer = connection.getresponse()
        handler.begin(answer.headers.get("Content-Type", "application/json"), answer.status)
        with suppress(ConnectionError):  # The client has read enough.
            while chunk := answer.read1(65536):
                handler.send_chunk(chunk)
            handler.finish_chunks()
        connection.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    api: CoreApi

    def _handle(self) -> None:
        with suppress(ConnectionError):
            self.api.handle(self)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: ``CoreApi.requests`` keeps what came."""

    def answer(self, status: int, document: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        for key, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
        ).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def begin(self, kind: str = "application/json", status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def send_line(self, line: dict[str, Any] | str) -> None:
        text = line if isinstance(line, str) else json.dumps(line)
        self.send_chunk(text.encode() + b"\n")

    def send_chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def finish_chunks(self) -> None:
        self.wfile.write(b"0\r\n\r\n")

    def drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def running(upstream: Path | None = None, **rest: Any) -> Iterator[CoreApi]:
    """A server on a free port of loopback. ``upstream``: kubeconfig of the real server for ray.io."""
    api = CoreApi(upstream=Upstream(upstream) if upstream else None, **rest)
    handler = type("Handler", (_Handler,), {"api": api})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    api.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _missing_namespace(name: str) -> dict[str, Any]:
    return {"kind": "Status", "code": 404, "reason": "NotFound", "message": f'namespaces "{name}" not found'}


def _selected(document: dict[str, Any], query: dict[str, str]) -> bool:
    metadata = document["metadata"]
    if (fields := query.get("fieldSelector")) and fields != f"metadata.name={metadata['name']}":
        return False
    labels = metadata.get("labels") or {}
    for rule in re.findall(r"[^,]+ in \([^)]*\)|[^,]+", query.get("labelSelector", "")):
        if match := re.fullmatch(r"(\S+) in \((.*)\)", rule):
            if labels.get(match[1]) not in match[2].split(","):
                return False
        elif labels.get(rule.split("=")[0]) != rule.split("=")[1]:
            return False
    return True


def _leaves(node: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in node.items():
        here = (*path, key)
        if here in (("apiVersion",), ("kind",)):
            continue
        if isinstance(value, dict) and value:
            yield from _leaves(value, here)
        else:
            yield here, value


def _at(node: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _put_at(node: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        node = node.setdefault(key, {})
    node[path[-1]] = copy.deepcopy(value)


def _remove_at(node: dict[str, Any], path: tuple[str, ...]) -> None:
    for key in path[:-1]:
        node = node.get(key, {})
    node.pop(path[-1], None)
