"""HTTP gateway of a service: its RPCs as JSON beside gRPC, with the same rules.

A service's lifespan enters `http_serving` with a table of routes. Interfaces of other tools are added as routers of
their own; their handlers call the servicer with `call_context`. uvicorn runs in the service's process, on its event
loop, without signal handlers, and is drained with the rest.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from perigee.errors import FieldViolation, InvalidArgumentError, UnavailableError
from services.kit.config import HttpConfig, ServerConfig
from services.kit.http.errors import WriteError, write_error
from services.kit.http.middleware import EVENTS, CallMiddleware, Calls, read_token
from services.kit.http.routes import CallContext, HttpRoute, StreamResponse, call_context, make_endpoint
from services.kit.server import App
from services.kit.telemetry import get_logger, http_request_histogram
from services.kit.tls import server_context

__all__ = [
    "EVENTS",
    "CallContext",
    "CompatRouter",
    "HttpConfig",
    "HttpRoute",
    "StreamResponse",
    "build_gateway",
    "call_context",
    "http_serving",
    "read_token",
    "write_error",
]

log = get_logger(__name__)

OPEN_PATHS = ("/healthz", "/readyz", "/metrics")
# Longer than clients keep connections, so that none is closed here while it is taken up again there.
_KEEP_ALIVE_S = 75
_FLUSH_S = 2.0


@dataclass(frozen=True)
class CompatRouter:
    """Interface of another tool: its routes, and the form of its errors.

    Bodies for `raw_paths` need not be JSON: their handlers ask for a header that no web page may send unasked.
    """

    router: APIRouter
    write_error: WriteError
    raw_paths: frozenset[str] = frozenset()


@asynccontextmanager
async def http_serving(
    app: App[Any],
    http: HttpConfig,
    routes: Sequence[HttpRoute],
    servicer: object,
    openapi_file: Path,
    compat: Sequence[CompatRouter] = (),
) -> AsyncIterator[str | None]:
    """Answers HTTP for as long as the block lasts, and yields where: host:port, or None where `http.port` is unset.

    `openapi_file` is the service's description, as tools/openapi.py writes it. Requests in flight are drained with the
    gRPC calls. Raises UnavailableError when the port cannot be bound.
    """
    if http.port is None:
        yield None
        return
    server_config = app.config.server
    calls = Calls(server_config.max_concurrent_rpcs)
    gateway = build_gateway(app.name, routes, servicer, compat, app.readiness)
    document = _read_openapi(openapi_file, app.access.needs_token)
    gateway.openapi = lambda: document  # type: ignore[method-assign]
    gateway.add_middleware(
        CallMiddleware,
        calls=calls,
        access=app.access,
        audience=http.audience,
        rpc_paths={route.path for route in routes},
        max_body_bytes=http.max_body_bytes or 3 * app.config.message_bytes // 2,
        timeout_s=http.timeout_seconds,
        seconds=http_request_histogram(app.name),
        open_paths=OPEN_PATHS,
        write_errors={route.path: api.write_error for api in compat for route in api.router.routes},  # type: ignore[attr-defined]
        raw_paths={path for api in compat for path in api.raw_paths},
    )
    server = HttpServer(gateway, calls, server_config, http.port)
    app.on_drain(server.stop)
    app.http_address = server.address
    log.info("http listening", address=server.address)
    try:
        yield server.address
    finally:
        await server.stop()


def build_gateway(
    name: str,
    routes: Sequence[HttpRoute],
    servicer: object,
    compat: Sequence[CompatRouter],
    readiness: Callable[[], Mapping[str, bool]],
) -> FastAPI:
    """Returns the application of service `name`: routes, interfaces of other tools, health, readiness, metrics."""
    gateway = FastAPI(title=f"Perigee {name}", version="v1", docs_url=None, redoc_url=None, redirect_slashes=False)
    for route in routes:
        gateway.add_api_route(
            route.path, make_endpoint(route, servicer), methods=[route.method], name=route.rpc, include_in_schema=False
        )
    for api in compat:
        gateway.include_router(api.router)
    _add_probes(gateway, readiness)
    gateway.add_exception_handler(RequestValidationError, _refuse_invalid)
    gateway.add_exception_handler(HTTPException, _refuse_unreadable)
    return gateway


def _read_openapi(file: Path, has_token: bool) -> dict[str, Any]:
    """Returns the committed document, with the bearer token where the service asks for one."""
    document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if has_token:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
        for path in OPEN_PATHS:
            document["paths"][path]["get"]["security"] = []
    return document


def _add_probes(gateway: FastAPI, readiness: Callable[[], Mapping[str, bool]]) -> None:
    """Adds liveness, readiness and metrics, which need no token."""

    @gateway.get("/healthz", summary="Whether the process answers.")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @gateway.get("/readyz", summary="Whether the service takes calls; 503 where it does not.")
    async def readyz() -> JSONResponse:
        ready = readiness()
        return JSONResponse({"ready": ready}, 200 if all(ready.values()) else 503)

    @gateway.get("/metrics", summary="Metrics for Prometheus.", response_class=Response)
    async def metrics() -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


async def _refuse_invalid(request: Request, error: Exception) -> NoReturn:
    """Raises what a compatibility route's model refused, field by field."""
    assert isinstance(error, RequestValidationError)
    violations = [
        # The place in text that is not JSON is no field.
        FieldViolation(
            _write_location(detail["loc"][: 1 if detail["type"] == "json_invalid" else None]),
            detail["msg"].removeprefix("Value error, "),
        )
        for detail in error.errors()
    ]
    raise InvalidArgumentError.for_fields(violations) from error


async def _refuse_unreadable(request: Request, error: Exception) -> NoReturn:
    """Raises that the body of a compatibility route cannot be read."""
    assert isinstance(error, HTTPException)
    raise InvalidArgumentError.for_field("body", f"is not JSON in UTF-8: {error.detail}") from error


def _write_location(location: Sequence[str | int]) -> str:
    """Returns the path of a field, the body's own name left out."""
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in location[1:]]
    return "".join(steps).removeprefix(".") or "body"


class HttpServer:
    """uvicorn server of an ASGI application, which serves until `stop`; `address` is where it listens."""

    def __init__(self, app: ASGIApp, calls: Calls, config: ServerConfig, port: int) -> None:
        self._calls = calls
        self._drain_seconds = config.drain_seconds
        context = server_context(config)
        uvicorn_config = uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            ssl_context_factory=(lambda *_: context) if context is not None else None,
        )
        uvicorn_config.load()
        self._server = _Uvicorn(uvicorn_config)
        listening = _bind(config.host, port)
        self.address = f"{config.host}:{listening.getsockname()[1]}"
        self._task = asyncio.create_task(self._server.serve(sockets=[listening]))

    async def stop(self) -> None:
        """Takes no more connections, lets requests finish within `drain_seconds`, then ends; may be called again."""
        self._server.should_exit = True
        await self._calls.drain(self._drain_seconds)
        await asyncio.wait({self._task}, timeout=_FLUSH_S)
        for connection in list(self._server.server_state.connections):
            # A caller that does not read what it asked for.
            if connection.transport is not None:
                connection.transport.abort()
        await self._task


class _Uvicorn(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # signals are the process's


def _bind(host: str, port: int) -> socket.socket:
    """Returns a listening socket; raises UnavailableError when the address is taken."""
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        family = socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UnavailableError(f"http.port: {host}:{port} cannot be bound; choose another port") from error
