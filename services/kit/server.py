"""The process of a service: one gRPC server with health, reflection, metrics, and an orderly end."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, Generic, TypeVar

import grpc
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from perigee.errors import InvalidArgumentError, PerigeeError, UnavailableError
from perigee.rpc import KEEPALIVE_MS, ChannelOptions, ServiceClient
from services.kit.access import Access
from services.kit.addresses import is_loopback
from services.kit.config import ServerConfig, ServiceConfig
from services.kit.health import serving_probes
from services.kit.interceptors import CallInterceptor
from services.kit.telemetry import get_logger, request_histogram, start_logging
from services.kit.tls import server_credentials
from services.kit.tracing import client_interceptors, server_interceptors, start_tracing, stop_tracing

log = get_logger(__name__)

_PENDING_CALLS = 1 << 20
_GZIP_OR_NONE = 1 << grpc.Compression.NoCompression | 1 << grpc.Compression.Gzip
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

ConfigT = TypeVar("ConfigT", bound=ServiceConfig)
ClientT = TypeVar("ClientT", bound=ServiceClient)


class App(Generic[ConfigT]):
    """Context of a service's lifespan: configuration, the server to add to, readiness, clients of peers.

    `http_address` is where the service answers HTTP, `metrics_address` where probes and Prometheus are answered; None
    where it does not.
    """

    def __init__(
        self, config: ConfigT, access: Access, server: grpc.aio.Server, address: str, stack: AsyncExitStack
    ) -> None:
        self.config = config
        self.access = access
        self.server = server
        self.address = address
        self.http_address: str | None = None
        self.metrics_address: str | None = None
        self.name = config.section
        self._stack = stack
        self._names: list[str] = []
        self._ready: dict[str, bool] = {}
        # By required name, why it is not ready; a sentence.
        self._obstacles: dict[str, str] = {}
        self._running = False
        self._draining = False
        self._drains: list[Callable[[], Awaitable[None]]] = []
        self._health = health_aio.HealthServicer()
        self._publishing: asyncio.Task[None] | None = None
        self._statuses: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)

    def add(
        self,
        full_name: str,
        add_to_server: Callable[[Any, grpc.aio.Server], None],
        servicer: object,
        *,
        required: bool = True,
    ) -> None:
        """Serves `servicer` under `full_name`, not ready until `set_ready`; `/readyz` waits for what is required."""
        add_to_server(servicer, self.server)
        self._names.append(full_name)
        if required:
            self._obstacles[full_name] = ""
        self.set_ready(full_name, False)

    def set_ready(self, full_name: str, ready: bool, reason: str = "") -> None:
        """Tells the readiness of a service to grpc.health.v1, and the reason of one that is not to `/readyz`."""
        if full_name in self._obstacles:
            self._obstacles[full_name] = "" if ready else reason or f"{full_name} does not serve yet."
        if self._ready.get(full_name) != ready:
            self._ready[full_name] = ready
            self._statuses.put_nowait((full_name, SERVING if ready else NOT_SERVING))

    def readiness(self) -> dict[str, bool]:
        """Readiness of the services, as grpc.health.v1 reports it."""
        return {name: self._running and self._ready[name] for name in self._names}

    def find_obstacle(self) -> str | None:
        """Returns a sentence that says why the service cannot do its work; None where it can. Any thread may ask."""
        if self._draining:
            return "The service is stopping."
        if not self._running:
            return "The service is starting."
        return next(filter(None, list(self._obstacles.values())), None)

    def on_drain(self, drain: Callable[[], Awaitable[None]]) -> None:
        """Has `drain` awaited while the server drains, beside the calls in flight."""
        self._drains.append(drain)

    def connect(self, client_class: Callable[[str, ChannelOptions], ClientT], target: str) -> ClientT:
        """A client of a peer, closed when this service ends."""
        client = client_class(target, channel_options(self.config))
        self._stack.push_async_callback(client.close)
        return client

    async def start(self) -> None:
        """Begins to listen; liveness ("") is SERVING from here on."""
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflection.enable_server_reflection((*self._names, health_name, reflection.SERVICE_NAME), self.server)
        await self.server.start()
        self._running = True
        self.set_ready("", True)
        self._publishing = asyncio.create_task(self._publish_statuses())

    async def drain(self) -> None:
        """Says NOT_SERVING, lets calls in flight finish within `drain_seconds`, then stops."""
        self._running, self._draining = False, True
        await self._health.enter_graceful_shutdown()
        await asyncio.gather(self.server.stop(self.config.server.drain_seconds), *(drain() for drain in self._drains))
        if self._publishing is not None:
            await end_tasks(self._publishing)

    async def _publish_statuses(self) -> None:
        while True:
            await self._health.set(*await self._statuses.get())


def channel_options(config: ServiceConfig) -> ChannelOptions:
    """Returns how a service with this configuration reaches its peers: its token, its certificates and its traces."""
    server = config.server
    return ChannelOptions(
        token=server.token.get_secret_value() if server.token else None,
        token_file=server.token_file,
        ca_file=server.tls_ca_file,
        cert_file=server.tls_cert_file if server.tls_ca_file else None,
        key_file=server.tls_key_file if server.tls_ca_file else None,
        server_name=server.tls_server_name,
        interceptors=client_interceptors(),
    )


Lifespan = Callable[[App[ConfigT]], AbstractAsyncContextManager[None]]


def run(config: ConfigT, lifespan: Lifespan[ConfigT]) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a PerigeeError ends the process with one line and exit code 1."""
    start_logging(config.section, config.telemetry)
    start_tracing(config.section, config.telemetry)
    log.info("configuration", **{config.section: config.model_dump(mode="json")})
    try:
        uvloop.run(_run_until_signal(config, lifespan))
    except PerigeeError as error:
        print(f"{config.section}: {error.message}", file=sys.stderr)
        raise SystemExit(1) from error
    finally:
        stop_tracing()


async def end_tasks(*tasks: asyncio.Task[Any]) -> None:
    """Cancels tasks and waits for their ends; raises the error of one that failed."""
    for task in tasks:
        task.cancel()
    if tasks:
        # To await a task and suppress its cancellation would suppress the caller's, too.
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.result()


@asynccontextmanager
async def serving(config: ConfigT, lifespan: Lifespan[ConfigT]) -> AsyncIterator[App[ConfigT]]:
    """A running server for as long as the block lasts; `address` of the App is where it listens."""
    async with AsyncExitStack() as stack:
        access = Access(config)
        server = _build_server(config, access)
        app = App(config, access, server, _bind(server, config.server), stack)
        if config.server.metrics_port is not None:
            probes = serving_probes(config.server.host, config.server.metrics_port, app.find_obstacle)
            app.metrics_address = await stack.enter_async_context(probes)
        async with lifespan(app):
            await app.start()
            try:
                yield app
            finally:
                await app.drain()


async def _run_until_signal(config: ConfigT, lifespan: Lifespan[ConfigT]) -> None:
    """Serves until a signal, which also ends a start that waits, as for a peer."""
    stop, started = asyncio.Event(), asyncio.Event()

    async def serve() -> None:
        async with serving(config, lifespan) as app:
            started.set()
            log.info("listening", address=app.address, metrics=app.metrics_address)
            await stop.wait()
            log.info("draining", seconds=config.server.drain_seconds)

    task = asyncio.create_task(serve())

    def end() -> None:
        if not stop.is_set() and not started.is_set():
            task.cancel()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, end)
    await asyncio.wait([task])
    if task.cancelled() and stop.is_set():
        log.info("ended before it was ready")
        return
    await task


def _build_server(config: ServiceConfig, access: Access) -> grpc.aio.Server:
    """Returns a gRPC server with the interceptors of every service."""
    calls = CallInterceptor(access, config.server.max_concurrent_rpcs, request_histogram(config.section))
    interceptors: list[grpc.aio.ServerInterceptor] = [*server_interceptors(), calls]
    return grpc.aio.server(interceptors=interceptors, options=server_arguments(config))


def server_arguments(config: ServiceConfig) -> list[tuple[str, int]]:
    """gRPC's options of a server by name; gRPC takes no notice of a name that it does not know."""
    server = config.server
    ages = {
        "grpc.max_connection_age_ms": server.max_connection_age_seconds,
        "grpc.max_connection_age_grace_ms": server.max_connection_grace_seconds,
    }
    return [
        ("grpc.max_send_message_length", config.message_bytes),
        ("grpc.max_receive_message_length", config.message_bytes),
        ("grpc.so_reuseport", 0),
        # Past these gRPC would end calls by chance, before the interceptor could refuse them with a reason.
        ("grpc.server.max_pending_requests", _PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", _PENDING_CALLS),
        # A message of some hundred KiB could take hundreds of MiB; the interceptor decompresses, and bounds it.
        ("grpc.per_message_decompression", 0),
        ("grpc.compression_enabled_algorithms_bitset", _GZIP_OR_NONE),
        # Without it a channel that is silent but for its probes is closed after a few of them.
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 3),
        ("grpc.keepalive_permit_without_calls", 1),
        *((name, round(seconds * 1000)) for name, seconds in ages.items() if seconds is not None),
    ]


def _bind(server: grpc.aio.Server, config: ServerConfig) -> str:
    """Returns host:port.

    Raises UnavailableError when the address cannot be bound, InvalidArgumentError where others than this machine could
    reach the server without a token, or a file is no certificate.
    """
    if not is_loopback(config.host) and not config.has_tokens:
        message = f"is required to listen on {config.host}: set PERIGEE_TOKEN"
        raise InvalidArgumentError.for_field("server.token", message)
    target = f"{config.host}:{config.port}"
    credentials = server_credentials(config)
    try:
        port = server.add_secure_port(target, credentials) if credentials else server.add_insecure_port(target)
    except RuntimeError as error:
        raise UnavailableError(f"server.port: {target} cannot be bound; choose another port") from error
    return f"{config.host}:{port}"
