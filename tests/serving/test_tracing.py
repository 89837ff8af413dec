"""Spans of a request: one trace over all deployments, begun by the client if it says so."""

from __future__ import annotations

import json
import secrets
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import requests
from pydantic import ValidationError

from serve.tracing import Tracer, traceparent
from tests.serving.conftest import Endpoint
from tests.serving.media import image, png, sound, text, wav
from tests.serving.test_faults import wait_for
from unimoe_ray.config.serving import ServingConfig
from unimoe_ray.errors import UnimoeError


def spans_of(folder: Path, trace: str) -> list[dict]:
    """But one that is being written."""
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines(keepends=True)]
    return [
        span
        for span in map(json.loads, (line for line in lines if line.endswith("\n")))
        if span["context"]["trace_id"] == f"0x{trace}"
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_the_spans_of_a_request_are_one_trace(endpoint: Endpoint, traces: Path, stream: bool):
    trace, parent, seed = secrets.token_hex(16), secrets.token_hex(8), 7000 + stream
    content = [image(png(seed)), sound(wav(seed, 0.5)), text("what is this?")]
    body = {"model": endpoint.model, "messages": [{"role": "user", "content": content}], "max_completion_tokens": 4}
    answer = requests.post(
        f"{endpoint.url}/v1/chat/completions",
        json=body | {"temperature": 0, "stream": stream},
        headers={"traceparent": f"00-{trace}-{parent}-01"},
        timeout=60,
    )
    assert answer.status_code == 200 and answer.text
    wait_for(lambda: len(spans_of(traces, trace)) >= 4, 60)
    spans = spans_of(traces, trace)
    assert sorted((span["resource"]["attributes"]["service.name"], span["name"]) for span in spans) == [
        ("unimoe.audio", "encode"),
        ("unimoe.image", "encode"),
        ("unimoe.ingress", "chat"),
        ("unimoe.language", "generate"),
    ]
    (chat,) = [span for span in spans if span["name"] == "chat"]
    assert chat["parent_id"] == f"0x{parent}" and chat["attributes"]["files"] == 2
    assert {span["parent_id"] for span in spans if span is not chat} == {chat["context"]["span_id"]}
    (generate,) = [span for span in spans if span["name"] == "generate"]
    assert generate["attributes"]["tokens"] == 4 and generate["attributes"]["prompt_tokens"] > 4
    assert [event["name"] for event in generate["events"]] == ["first token"]
    assert chat["start_time"] < generate["start_time"] < generate["end_time"] <= chat["end_time"]


def test_spans_reach_a_collector():
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="unimoe_ray[tracing] is not installed")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    got: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    tracer = Tracer(f"http://127.0.0.1:{server.server_port}/v1/traces", "test")
    with tracer.span("outer", "", kind="image") as outer, tracer.span("inner", traceparent(outer)):
        pass

    def collected() -> dict[str, object]:
        found = [r for _, data in got for r in ExportTraceServiceRequest.FromString(data).resource_spans]
        return {span.name: span for resource in found for span in resource.scope_spans[0].spans}

    wait_for(lambda: len(collected()) == 2, 60)  # in one request, or one each
    server.shutdown()
    spans = collected()
    assert {path for path, _ in got} == {"/v1/traces"} and set(spans) == {"outer", "inner"}
    assert (
        spans["inner"].trace_id == spans["outer"].trace_id and spans["inner"].parent_span_id == spans["outer"].span_id
    )


def test_without_tracing_a_client_s_trace_goes_on_and_garbage_is_no_error():
    given = f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"
    tracer = Tracer(None, "test")
    with tracer.span("chat", given) as span:
        assert traceparent(span) == given
    for garbage in ("", "00-zz-yy-01", "x" * 5000):
        with tracer.span("chat", garbage) as span:
            assert traceparent(span) == ""


def test_mistakes_are_named(monkeypatch):
    with pytest.raises(ValidationError, match="absolute path of a folder"):
        ServingConfig(tracing="traces")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(UnimoeError, match=r"pip install 'unimoe_ray\[tracing\]'"):
        Tracer("http://collector:4318/v1/traces", "test")
