"""Logs, and metrics of requests."""

from __future__ import annotations

import logging
import sys
from typing import Any, cast

import structlog
from prometheus_client import REGISTRY, Histogram, Info
from structlog.typing import FilteringBoundLogger

import perigee
from services.kit.config import TelemetryConfig
from services.kit.tracing import add_trace_context


def start_logging(service: str, config: TelemetryConfig) -> None:
    """Sends the service's log and the libraries' warnings to standard error, a line each, with the service's name."""
    BUILD.info({"service": service, "version": perigee.__version__})

    def add_service(_logger: Any, _method: str, event: Any) -> Any:
        event["service"] = service
        return event

    context: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_service,
        add_trace_context,
    ]
    render: list[Any] = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    if config.log_format == "console":
        render = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    structlog.configure(
        processors=[*context, *render],
        wrapper_class=structlog.make_filtering_bound_logger(config.log_level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    of_libraries = logging.StreamHandler(sys.stderr)
    of_libraries.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*context, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[of_libraries])


def get_logger(name: str) -> FilteringBoundLogger:
    """The logger of a module."""
    return cast(FilteringBoundLogger, structlog.get_logger(module=name))


BUILD = Info("perigee_build", "Name and version of the service.")


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
