"""What lives as long as the buffer service: the Valkey server if it is ours, the Redis client, and readiness."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from perigee.buffer.v1.buffer_pb2_grpc import add_BufferServiceServicer_to_server
from perigee.errors import PerigeeError, UnavailableError
from services.buffer.config import BufferConfig
from services.buffer.local_server import local_server
from services.buffer.nodes import Nodes
from services.buffer.scripts import ScriptRunner
from services.buffer.service import BufferService
from services.kit.server import App
from services.kit.telemetry import get_logger

log = get_logger(__name__)

SERVICE_NAME = "perigee.buffer.v1.BufferService"
CHECK_EVERY_S = 1.0


@asynccontextmanager
async def lifespan(app: App[BufferConfig]) -> AsyncIterator[None]:
    """Serves the buffer; raises FailedPreconditionError when Redis can be reached but does not serve."""
    config = app.config
    async with AsyncExitStack() as stack:
        url = config.redis_url.get_secret_value()
        if not url:
            url = await stack.enter_async_context(local_server(config.data_path, config.local_server))
        nodes = Nodes(
            url,
            connections=config.connections,
            # A durable call may wait for the disk before its reply comes.
            timeout_s=config.request_timeout_s + config.durability_timeout_s,
        )
        stack.push_async_callback(nodes.close)
        scripts = ScriptRunner(nodes, durability=config.durability, durability_timeout_s=config.durability_timeout_s)
        try:
            await scripts.check()
        except UnavailableError as error:
            log.warning("redis cannot be reached yet", reason=error.message)
        app.add(SERVICE_NAME, add_BufferServiceServicer_to_server, BufferService(scripts, config))
        watcher = asyncio.create_task(_watch(app, scripts))
        try:
            yield
        finally:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher


async def _watch(app: App[BufferConfig], scripts: ScriptRunner) -> None:
    """Keeps the readiness of the service at that of Redis."""
    ready = False
    while True:
        try:
            await scripts.check()
            serves = True
        except PerigeeError as error:
            serves = False
            if ready:
                log.error("redis does not serve", reason=error.message)
        if serves != ready:
            ready = serves
            app.set_ready(SERVICE_NAME, ready)
            log.info("readiness", ready=ready)
        await asyncio.sleep(CHECK_EVERY_S)
