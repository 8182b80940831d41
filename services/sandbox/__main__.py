"""Starts the sandbox service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from perigee.sandbox.v1.sandbox_pb2_grpc import add_SandboxServiceServicer_to_server
from services.kit.config import load_config
from services.kit.http import http_serving
from services.kit.server import App, run
from services.kit.single_flight import SingleFlightCache
from services.sandbox.config import SandboxConfig
from services.sandbox.runtime.execute import check_jobs_run
from services.sandbox.runtime.pool import open_pool
from services.sandbox.runtime.sessions import Sessions
from services.sandbox.runtime.versions import Versions
from services.sandbox.service import FULL_NAME, OPENAPI_FILE, ROUTES, Response, SandboxService, compat_routers, is_final

MOST_RESULTS = 10_000


@asynccontextmanager
async def lifespan(app: App[SandboxConfig]) -> AsyncIterator[None]:
    """Opens the pool, its sessions and both fronts of the service; ready once a job has run."""
    config = app.config
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(open_pool(config))
        await check_jobs_run(pool)
        sessions = Sessions(pool)
        stack.push_async_callback(sessions.close)
        results: SingleFlightCache[str, Response] = SingleFlightCache(
            MOST_RESULTS,
            total_bytes=config.result_cache_bytes,
            ttl_s=config.result_cache_seconds,
            size_of=lambda response: response.ByteSize(),
            is_final=is_final,
            key_field="idempotency_key",
        )
        stack.push_async_callback(results.close)
        service = SandboxService(pool, sessions, Versions(pool), results)
        app.add(FULL_NAME, add_SandboxServiceServicer_to_server, service)
        compat = compat_routers(service)
        await stack.enter_async_context(http_serving(app, config.http, ROUTES, service, OPENAPI_FILE, compat))
        app.set_ready(FULL_NAME, True)
        yield


def main() -> None:
    """Runs the service."""
    run(load_config(SandboxConfig), lifespan)


if __name__ == "__main__":
    main()
