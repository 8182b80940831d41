"""uvicorn inside the service's process: on its event loop, without signal handlers, drained with the rest."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from perigee.errors import UnavailableError
from services.kit.config import ServerConfig
from services.kit.http_calls import Calls

# Longer than clients keep connections, so that none is closed here while it is taken up again there.
_KEEP_ALIVE_S = 75
_FLUSH_S = 2.0


class HttpServer:
    """Serves an ASGI application from `start` to `stop`; `address` is where."""

    def __init__(self, app: ASGIApp, calls: Calls, config: ServerConfig, port: int) -> None:
        self._calls = calls
        self._drain_seconds = config.drain_seconds
        has_tls = config.tls_cert_file is not None and config.tls_key_file is not None
        uvicorn_config = uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            ssl_certfile=config.tls_cert_file if has_tls else None,
            ssl_keyfile=config.tls_key_file if has_tls else None,
            ssl_ca_certs=config.tls_ca_file if has_tls else None,
            ssl_cert_reqs=ssl.CERT_REQUIRED if has_tls and config.tls_ca_file else ssl.CERT_NONE,
        )
        uvicorn_config.load()
        self._server = _Uvicorn(uvicorn_config)
        self._socket = _bind(config.host, port)
        self.address = f"{config.host}:{self._socket.getsockname()[1]}"
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to serve; connections made since the socket was bound wait until then."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))

    async def stop(self) -> None:
        """Takes no more connections, lets requests finish within `drain_seconds`, then ends; may be called again."""
        assert self._task is not None
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
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        family = socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UnavailableError(f"http.port: {host}:{port} cannot be bound; choose another port") from error
