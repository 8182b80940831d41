"""OpenTelemetry traces: spans, their export, and what calls and log lines carry of the run that they belong to.

A trace stays small enough to be drawn: what there may be many of begins a trace of its own with `detached_span`, linked
with the span around it. Attributes in `CARRIED` travel as baggage to everything below a span, in other services, too,
and become attributes of the spans and fields of the log lines there.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from google.protobuf.message import Message
from opentelemetry import baggage, propagate, trace
from opentelemetry.context import Context, attach, detach, get_current
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.grpc import aio_client_interceptors, aio_server_interceptor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

import perigee
from services.kit.config import TelemetryConfig

PREFIX = "perigee."
CARRIED = frozenset({"run", "iteration", "version", "worker", "trajectory"})
# Fields of requests, by the attribute that they are.
REQUEST_FIELDS = {"run": "run_id", "iteration": "iteration", "version": "policy_version", "worker": "worker_id"}
# Probes, heartbeats and polls would be most of the spans, and a watch lasts as long as its run.
UNTRACED = frozenset({"Check", "Watch", "RenewLease", "GetState", "GetStatus", "WatchRun", "ServerReflectionInfo"})
ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


class _Export:
    """Where this process's spans go; nowhere until `start_tracing`."""

    # Not OpenTelemetry's global provider, in which engines would find a place for spans of their own.
    provider: TracerProvider | None = None
    tracer: trace.Tracer = trace.NoOpTracer()


class _CarriedAttributes(SpanProcessor):
    """Gives every span what its context carries."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        span.set_attributes({PREFIX + key: value for key, value in carried(parent_context).items()})


def start_tracing(service: str, config: TelemetryConfig) -> None:
    """Exports spans to the collector that the configuration or OTEL_EXPORTER_OTLP_ENDPOINT names; else to nowhere.

    Other OTEL_* variables mean what the OpenTelemetry SDK says.
    """
    if not (config.otlp_endpoint or any(os.environ.get(name) for name in ENDPOINT_VARIABLES)):
        return
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        return
    instance = f"{socket.gethostname()}:{os.getpid()}"
    attributes = {"service.version": perigee.__version__, "service.instance.id": instance}
    if "OTEL_SERVICE_NAME" not in os.environ:
        attributes["service.name"] = f"perigee-{service}"
    # A bare host:port is in clear; the scheme decides about http:// and https://, and the SDK about a variable.
    insecure = True if config.otlp_endpoint and "://" not in config.otlp_endpoint else None
    provider = TracerProvider(resource=Resource.create(attributes))
    provider.add_span_processor(_CarriedAttributes())
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(config.otlp_endpoint, insecure)))
    _Export.provider, _Export.tracer = provider, provider.get_tracer("perigee", perigee.__version__)


def stop_tracing() -> None:
    """Sends the spans not exported yet."""
    if _Export.provider is not None:
        _Export.provider.shutdown()
    _Export.provider, _Export.tracer = None, trace.NoOpTracer()


def server_interceptors() -> list[Any]:
    """Returns what opens the spans of calls that are served."""
    if _Export.provider is None:
        return []
    return [aio_server_interceptor(tracer_provider=_Export.provider, filter_=_is_traced)]  # type: ignore[no-untyped-call]


def client_interceptors() -> list[Any]:
    """Returns what opens the spans of calls that are made, and sends trace and baggage along."""
    if _Export.provider is None:
        return []
    return [*aio_client_interceptors(tracer_provider=_Export.provider, filter_=_is_traced)]  # type: ignore[no-untyped-call]


@contextmanager
def span(name: str, kind: trace.SpanKind = trace.SpanKind.INTERNAL, **attributes: str | float) -> Iterator[trace.Span]:
    """Opens a span below the current one; attributes are named `perigee.NAME`."""
    with _opened(name, _carry(attributes), kind) as opened:
        describe(opened, **attributes)
        yield opened


@contextmanager
def detached_span(name: str, **attributes: str | float) -> Iterator[trace.Span]:
    """Opens a span that begins a trace; it and the current span have links to each other.

    A span keeps 128 links unless OTEL_SPAN_LINK_COUNT_LIMIT says otherwise.
    """
    outer = trace.get_current_span()
    with _opened(name, trace.set_span_in_context(trace.INVALID_SPAN, _carry(attributes))) as opened:
        for one, other in ((outer, opened), (opened, outer)):
            if one.is_recording() and other.get_span_context().is_valid:
                one.add_link(other.get_span_context())
        describe(opened, **attributes)
        yield opened


@contextmanager
def http_span(route: str, headers: Mapping[str, str]) -> Iterator[trace.Span]:
    """Opens the span of an HTTP request, below the caller's where its `traceparent` names one."""
    with _opened(route, propagate.extract(headers), trace.SpanKind.SERVER) as opened:
        yield opened


def describe(opened: trace.Span, **attributes: str | float) -> None:
    """Sets attributes of a span, named `perigee.NAME`."""
    for name, value in attributes.items():
        opened.set_attribute(PREFIX + name, _encodable(value) if isinstance(value, str) else value)


def mark_failed(opened: trace.Span, reason: str) -> None:
    """Sets the status of a span to an error."""
    opened.set_status(trace.StatusCode.ERROR, _encodable(reason))


def carry_request(request: Any) -> None:
    """Has the rest of this task carry the run, iteration, version and worker of a request; of a stream, nothing."""
    if not isinstance(request, Message):
        return
    fields = request.DESCRIPTOR.fields_by_name
    found = {key: getattr(request, name) for key, name in REQUEST_FIELDS.items() if name in fields}
    if found := {key: value for key, value in found.items() if value}:
        describe(trace.get_current_span(), **found)
        # Each call has a task, and so a context, of its own.
        attach(_carry(found))


def carried(context: Context | None = None) -> dict[str, str | int]:
    """Returns what a context carries, the current one unless another is given."""
    values = {key: baggage.get_baggage(PREFIX + key, context) for key in sorted(CARRIED)}
    return {
        key: int(value) if key in ("iteration", "version") and value.isdecimal() else value
        for key, value in values.items()
        if isinstance(value, str)
    }


def add_trace_context(_logger: Any, _method: str, event: Any) -> Any:
    """Adds to a log line what its context carries, and the ids of its span; a processor of structlog."""
    for key, value in carried().items():
        event.setdefault(key, value)
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = trace.format_trace_id(context.trace_id)
        event["span_id"] = trace.format_span_id(context.span_id)
    return event


def _carry(attributes: Mapping[str, str | float]) -> Context:
    """Returns the current context with those attributes as baggage that are carried."""
    context = get_current()
    for key in attributes.keys() & CARRIED:
        context = baggage.set_baggage(PREFIX + key, str(attributes[key]), context)
    return context


@contextmanager
def _opened(name: str, context: Context, kind: trace.SpanKind = trace.SpanKind.INTERNAL) -> Iterator[trace.Span]:
    """Opens a span in a context for as long as the block lasts; an error that leaves it is its status."""
    token = attach(context)
    try:
        with _Export.tracer.start_as_current_span(
            name, kind=kind, record_exception=False, set_status_on_exception=False
        ) as opened:
            try:
                yield opened
            except Exception as error:
                mark_failed(opened, f"{type(error).__name__}: {error}")
                raise
    finally:
        detach(token)


def _encodable(text: str) -> str:
    """Returns text that UTF-8 can hold: a span with other text would cost its whole batch."""
    return text.encode(errors="replace").decode()


def _is_traced(details: Any) -> bool:
    method = details.method
    return (method.decode() if isinstance(method, bytes) else method).rpartition("/")[2] not in UNTRACED
