"""Spans of requests, as OpenTelemetry's collectors take them; which trace they belong to travels with the calls."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.trace import NoOpTracer, Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from unimoe_ray.errors import UnimoeError

EXPORT_INTERVAL_MS = 1000
_W3C = TraceContextTextMapPropagator()


class Tracer:
    """The spans of one process. where: as in ``serving.tracing``; part: of the system, for the name of the service.
    Raises UnimoeError when OTLP is asked for and its exporter is not installed."""

    def __init__(self, where: str | None, part: str):
        if where is None:
            self._tracer = NoOpTracer()
            return
        provider = TracerProvider(resource=Resource.create({"service.name": f"unimoe.{part}"}))
        exporter = _exporter(where, part)
        provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=EXPORT_INTERVAL_MS))
        self._tracer = provider.get_tracer("unimoe_ray")

    @contextmanager
    def span(self, name: str, parent: str, **attributes: str | int) -> Iterator[Span]:
        """``parent``: its W3C traceparent, of another process; without one a trace begins here."""
        context = _W3C.extract({"traceparent": parent})
        span = self._tracer.start_span(name, context, SpanKind.SERVER, attributes)
        try:
            yield span
        except Exception as error:
            span.set_status(Status(StatusCode.ERROR, f"{type(error).__name__}: {error}"))
            raise
        finally:
            span.end()


def traceparent(span: Span) -> str:
    """What makes spans elsewhere children of this one; empty if there is nothing to trace."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, set_span_in_context(span))
    return carrier.get("traceparent", "")


def _exporter(where: str, part: str) -> SpanExporter:
    if where.startswith("/"):
        folder = Path(where)
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / f"{part}-{socket.gethostname()}-{os.getpid()}.jsonl").open("a", encoding="utf-8")
        return ConsoleSpanExporter(out=file, formatter=lambda span: span.to_json(indent=None) + "\n")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise UnimoeError(f"serving.tracing {where}: needs pip install 'unimoe_ray[tracing]'") from None
    return OTLPSpanExporter(endpoint=where)
