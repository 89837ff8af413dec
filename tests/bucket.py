"""A bucket of files over HTTP on the loopback: plain GETs with ranges, and as much of S3 as reading needs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


@contextmanager
def bucket(files: dict[str, bytes]) -> Iterator[str]:
    """Serves ``files`` by their keys (``bucket/name``); yields the URL of the server."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            key, query = unquote(url.path).strip("/"), parse_qs(url.query)
            if "list-type" in query:
                self._send(200, _listing(files, key, query), {"Content-Type": "application/xml"})
            elif key not in files:  # a bucket, or nothing
                self._send(200 if "/" not in key and any(name.startswith(f"{key}/") for name in files) else 404, b"")
            elif given := self.headers.get("Range"):
                data = files[key]
                first, last = given.removeprefix("bytes=").split("-")
                start, stop = int(first), min(int(last or len(data)), len(data) - 1)
                head = {"Content-Range": f"bytes {start}-{stop}/{len(data)}"}
                self._send(206, data[start : stop + 1], head)
            else:
                self._send(200, files[key], {"Accept-Ranges": "bytes"})

        def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            common = {"ETag": '"1"', "Last-Modified": "Tue, 24 Nov 2026 12:00:00 GMT"}
            for name, value in ({"Content-Length": str(len(body))} | common | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _listing(files: dict[str, bytes], name: str, query: dict[str, list[str]]) -> bytes:
    prefix = query.get("prefix", [""])[0]
    inside = sorted(key.removeprefix(f"{name}/") for key in files if key.startswith(f"{name}/{prefix}"))
    folders, entries = set(), []
    for key in inside:
        rest = key[len(prefix) :]
        if "delimiter" in query and "/" in rest:
            folders.add(prefix + rest.partition("/")[0] + "/")
        else:
            entries.append(key)
    contents = "".join(
        f"<Contents><Key>{escape(key)}</Key><Size>{len(files[f'{name}/{key}'])}</Size><ETag>1</ETag>"
        "<LastModified>2026-11-24T12:00:00.000Z</LastModified></Contents>"
        for key in entries
    )
    common = "".join(f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in sorted(folders))
    return (
        '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{name}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(entries) + len(folders)}</KeyCount>"
        f"<MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>{contents}{common}</ListBucketResult>"
    ).encode()
