"""The HTTP gateway of a service: its RPCs as JSON beside gRPC, with the same rules.

A service's lifespan enters `http_serving` with a table of routes. Interfaces of other tools are added as routers of
their own; their handlers call the servicer with `call_context`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from perigee.errors import FieldViolation, InvalidArgumentError
from services.kit.config import HttpConfig
from services.kit.http_calls import Calls
from services.kit.http_errors import WriteError
from services.kit.http_gate import Gate, GateOptions
from services.kit.http_routes import CallContext, HttpRoute, call_context, make_endpoint
from services.kit.http_server import HttpServer
from services.kit.openapi import describe_routes
from services.kit.server import App, require_token_off_loopback
from services.kit.telemetry import get_logger, http_request_histogram

__all__ = ["CallContext", "ForeignApi", "HttpConfig", "HttpRoute", "build_gateway", "call_context", "http_serving"]

log = get_logger(__name__)

OPEN_PATHS = ("/healthz", "/readyz", "/metrics")


@dataclass(frozen=True)
class ForeignApi:
    """The interface of another tool: its routes, without path parameters, and the form of its errors."""

    router: APIRouter
    write_error: WriteError


@asynccontextmanager
async def http_serving(
    app: App[Any], http: HttpConfig, routes: Sequence[HttpRoute], servicer: object, foreign: Sequence[ForeignApi] = ()
) -> AsyncIterator[str | None]:
    """Answers HTTP for as long as the block lasts, and yields where: host:port, or None where `http.port` is unset.

    Requests under way are drained with the gRPC calls. Raises UnavailableError when the port cannot be bound.
    """
    if http.port is None:
        yield None
        return
    server_config = app.config.server
    require_token_off_loopback(server_config)
    calls = Calls(server_config.max_concurrent_rpcs)
    gateway = build_gateway(app, http, routes, servicer, foreign, calls)
    server = HttpServer(gateway, calls, server_config, http.port)
    server.start()
    app.on_drain(server.stop)
    app.http_address = server.address
    log.info("http listening", address=server.address)
    try:
        yield server.address
    finally:
        await server.stop()


def build_gateway(
    app: App[Any],
    http: HttpConfig,
    routes: Sequence[HttpRoute],
    servicer: object,
    foreign: Sequence[ForeignApi],
    calls: Calls,
) -> FastAPI:
    """The application: routes, interfaces of other tools, health, readiness, metrics, /openapi.json."""
    gateway = FastAPI(title=f"Perigee {app.name}", version="v1", docs_url=None, redoc_url=None, redirect_slashes=False)
    for route in routes:
        gateway.add_api_route(
            route.path, make_endpoint(route, servicer), methods=[route.method], name=route.rpc, include_in_schema=False
        )
    for api in foreign:
        gateway.include_router(api.router)
    _add_probes(gateway, app)
    token = app.config.server.token.get_secret_value() if app.config.server.token else None
    options = GateOptions(
        token=token,
        max_body_bytes=http.max_body_bytes or 2 * app.config.message_bytes,
        seconds=http_request_histogram(app.name),
        open_paths=OPEN_PATHS,
        write_errors={route.path: api.write_error for api in foreign for route in api.router.routes},  # type: ignore[attr-defined]
    )
    gateway.add_middleware(Gate, calls=calls, options=options)
    gateway.add_exception_handler(RequestValidationError, _refuse_invalid)
    gateway.add_exception_handler(HTTPException, _refuse_unreadable)
    gateway.openapi = partial(_describe, gateway, routes, type(servicer), token is not None)  # type: ignore[method-assign]
    return gateway


def _add_probes(gateway: FastAPI, app: App[Any]) -> None:
    @gateway.get("/healthz", summary="Whether the process answers.")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @gateway.get("/readyz", summary="Whether the service takes calls; 503 where it does not.")
    async def readyz() -> JSONResponse:
        readiness = app.readiness()
        return JSONResponse({"ready": readiness}, 200 if all(readiness.values()) else 503)

    @gateway.get("/metrics", summary="Metrics for Prometheus.", response_class=Response)
    async def metrics() -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


def _describe(gateway: FastAPI, routes: Sequence[HttpRoute], servicer: type, has_token: bool) -> dict[str, Any]:
    if gateway.openapi_schema is None:
        document = FastAPI.openapi(gateway)
        paths, schemas = describe_routes(routes, _generated_servicer(servicer))
        document["paths"] = paths | document["paths"]
        components = document.setdefault("components", {})
        known = components.setdefault("schemas", {})
        if common := known.keys() & schemas.keys():
            raise ValueError(f"a message and a model go by one name: {', '.join(common)}")
        known |= schemas
        if has_token:
            components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"token": []}]
            for path in OPEN_PATHS:
                document["paths"][path]["get"]["security"] = []
        gateway.openapi_schema = document
    return gateway.openapi_schema


def _generated_servicer(servicer: type) -> type:
    return next((base for base in servicer.__mro__ if base.__module__.endswith("_pb2_grpc")), servicer)


async def _refuse_invalid(request: Request, error: Exception) -> NoReturn:
    assert isinstance(error, RequestValidationError)
    violations = [
        FieldViolation(_write_location(detail["loc"]), detail["msg"].removeprefix("Value error, "))
        for detail in error.errors()
    ]
    message = "; ".join(f"{violation.field}: {violation.description}" for violation in violations[:5])
    raise InvalidArgumentError(message, violations=violations) from error


async def _refuse_unreadable(request: Request, error: Exception) -> NoReturn:
    assert isinstance(error, HTTPException)
    raise InvalidArgumentError.for_field("body", f"is not JSON in UTF-8: {error.detail}") from error


def _write_location(location: Sequence[str | int]) -> str:
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in location[1:]]
    return "".join(steps).removeprefix(".") or "body"
