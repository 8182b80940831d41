"""Starts the sandbox service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from perigee.sandbox.v1.sandbox_pb2_grpc import add_SandboxServiceServicer_to_server
from services.kit.config import load_config
from services.kit.http import http_serving
from services.kit.server import App, run
from services.sandbox.compat.piston import piston_api
from services.sandbox.compat.sandbox_fusion import sandbox_fusion_api
from services.sandbox.config import SandboxConfig
from services.sandbox.http_routes import ROUTES
from services.sandbox.pool import open_pool
from services.sandbox.service import FULL_NAME, SandboxService


@asynccontextmanager
async def lifespan(app: App[SandboxConfig]) -> AsyncIterator[None]:
    """The slots, for as long as the service runs."""
    async with open_pool(app.config) as pool:
        servicer = SandboxService(pool, app.config)
        app.add(FULL_NAME, add_SandboxServiceServicer_to_server, servicer)
        foreign = (sandbox_fusion_api(servicer), piston_api(servicer))
        async with http_serving(app, app.config.http, ROUTES, servicer, foreign):
            app.set_ready(FULL_NAME, True)
            yield


def main() -> None:
    """The service's process."""
    run(load_config(SandboxConfig), lifespan)


if __name__ == "__main__":
    main()
