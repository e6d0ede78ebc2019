"""Traces over OTLP/HTTP, where an endpoint is set; without one nothing that makes them is even imported.

Spans are sent by a separate thread: a collector that is unavailable costs spans, never time.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from service.settings import TelemetrySettings

if TYPE_CHECKING:
    from fastapi import FastAPI
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import SpanContext
    from sqlalchemy import Engine

_EXPORT_SECONDS = 3.0
_CLOSE_SECONDS = 4.0
_COMPLAINT_SECONDS = 60.0
_NOT_TRACED = "/healthz,/readyz,/metrics"

Note = Callable[[Mapping[str, Any]], None]


def trace_id() -> str | None:
    """Of the trace that this code runs in, as 32 hexadecimal digits."""
    current = _current()
    return None if current is None else f"{current.trace_id:032x}"


def traceparent() -> str | None:
    """Names the span that this code runs in (W3C), for spans that other processes make later; None where there is none."""
    current = _current()
    return None if current is None else f"00-{current.trace_id:032x}-{current.span_id:016x}-{current.trace_flags:02x}"


def _current() -> "SpanContext | None":
    api = sys.modules.get("opentelemetry.trace")
    if api is None:  # tracing is off
        return None
    context: SpanContext = api.get_current_span().get_span_context()
    return context if context.is_valid else None


class Traces:
    """The spans of this process; `close` sends the last of them."""

    def __init__(self, settings: TelemetrySettings, service: str) -> None:
        self._provider = _make_provider(settings.endpoint, service) if settings.endpoint else None

    @property
    def are_made(self) -> bool:
        return self._provider is not None

    def instrument(self, app: "FastAPI", engine: "Engine") -> None:
        """From now on every request makes a span, and every statement of the engine one below it."""
        if self._provider is None:
            return
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
        from opentelemetry.instrumentation.sqlalchemy.engine import EngineTracer
        from opentelemetry.metrics import NoOpMeterProvider

        meters = NoOpMeterProvider()  # figures are Prometheus's
        FastAPIInstrumentor.instrument_app(
            app,
            tracer_provider=self._provider,
            meter_provider=meters,
            excluded_urls=_NOT_TRACED,
            exclude_spans=["receive", "send"],
        )
        # By engine: the instrumentor of the whole library would also trace the dispatcher's passes, each as a root.
        usage = meters.get_meter("winnow").create_up_down_counter("connections")
        EngineTracer(self._provider.get_tracer("winnow.sql"), engine, usage)  # type: ignore[no-untyped-call]

    @contextmanager
    def statement(self, text: str) -> Iterator[None]:
        """The span of a statement that does not go through the engine; only where spans are made."""
        from opentelemetry.trace import SpanKind

        assert self._provider is not None
        attributes = {"db.system": "postgresql", "db.statement": text}
        tracer, name = self._provider.get_tracer("winnow.sql"), text.split(maxsplit=1)[0]
        with tracer.start_as_current_span(name, kind=SpanKind.CLIENT, attributes=attributes):
            yield

    @contextmanager
    def span(self, name: str, parent: str | None, attributes: Mapping[str, Any]) -> Iterator[Note]:
        """A span below `parent` (a traceparent), or a root where there is none. The function that it gives adds attributes; with
        `error.type` among them the span is one that failed."""
        if self._provider is None:
            yield lambda _: None
            return
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        above = TraceContextTextMapPropagator().extract({"traceparent": parent or ""})
        tracer = self._provider.get_tracer("winnow")
        with tracer.start_as_current_span(name, above, SpanKind.CONSUMER, attributes) as span:

            def note(found: Mapping[str, Any]) -> None:
                span.set_attributes(found)
                if "error.type" in found:
                    span.set_status(StatusCode.ERROR, found["error.type"])

            yield note

    def close(self) -> None:
        """Sends what has ended; gives up after a few seconds, so that an unavailable collector does not delay a shutdown."""
        if self._provider is not None:
            closing = threading.Thread(target=self._provider.shutdown, name="traces-close", daemon=True)
            closing.start()
            closing.join(_CLOSE_SECONDS)


def _make_provider(endpoint: str, service: str) -> "TracerProvider":
    from opentelemetry.exporter.otlp.proto.http import trace_exporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    for name in (trace_exporter.__name__, "opentelemetry.sdk._shared_internal"):
        logging.getLogger(name).addFilter(_Seldom())
    exporter = trace_exporter.OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=_EXPORT_SECONDS)
    provider = TracerProvider(resource=Resource.create({"service.name": service}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


class _Seldom(logging.Filter):
    """One record per minute: while the collector is unavailable, every batch logs an error."""

    def __init__(self) -> None:
        super().__init__()
        self._last = -_COMPLAINT_SECONDS

    def filter(self, record: logging.LogRecord) -> bool:  # noqa: ARG002
        now = time.monotonic()
        if now - self._last < _COMPLAINT_SECONDS:
            return False
        self._last = now
        return True
