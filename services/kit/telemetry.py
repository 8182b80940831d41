"""JSON logs, request metrics and OpenTelemetry traces."""

from __future__ import annotations

import logging
import sys
from typing import cast

import structlog
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from prometheus_client import REGISTRY, Histogram
from structlog.typing import FilteringBoundLogger

from services.kit.config import TelemetryConfig


def start_logging(service: str, config: TelemetryConfig) -> None:
    """Sends the service's log to standard error, one JSON object a line, each with the service's name."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(config.log_level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")


def get_logger(name: str) -> FilteringBoundLogger:
    """The logger of a module."""
    return cast(FilteringBoundLogger, structlog.get_logger(module=name))


def start_tracing(service: str, config: TelemetryConfig) -> None:
    """Exports spans to the configured collector; without one, spans are not recorded."""
    if config.otlp_endpoint is None:
        return
    provider = TracerProvider(resource=Resource.create({"service.name": f"perigee-{service}"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=config.otlp_endpoint, insecure=True)))
    trace.set_tracer_provider(provider)


def stop_tracing() -> None:
    """Sends the spans not exported yet."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):
        provider.shutdown()


def request_histogram(service: str) -> Histogram:
    """Seconds per gRPC call, by method and status code; one per service and process."""
    return _histogram(f"perigee_{service}_request_seconds", "Seconds per gRPC call.", ["method", "code"])


def http_request_histogram(service: str) -> Histogram:
    """Seconds per HTTP request, by route and status code; one per service and process."""
    return _histogram(f"perigee_{service}_http_request_seconds", "Seconds per HTTP request.", ["route", "code"])


def _histogram(name: str, documentation: str, labels: list[str]) -> Histogram:
    """Returns the histogram of this name, made once per process."""
    known = REGISTRY._names_to_collectors.get(name)
    return known if isinstance(known, Histogram) else Histogram(name, documentation, labels)
