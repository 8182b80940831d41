"""Starts the sandbox service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from perigee.sandbox.v1.sandbox_pb2_grpc import add_SandboxServiceServicer_to_server
from services.kit.config import load_config
from services.kit.server import App, run
from services.sandbox.config import SandboxConfig
from services.sandbox.pool import open_pool
from services.sandbox.service import FULL_NAME, SandboxService


@asynccontextmanager
async def lifespan(app: App[SandboxConfig]) -> AsyncIterator[None]:
    """The slots, for as long as the service runs."""
    async with open_pool(app.config) as pool:
        app.add(FULL_NAME, add_SandboxServiceServicer_to_server, SandboxService(pool, app.config))
        app.set_ready(FULL_NAME, True)
        yield


def main() -> None:
    """The service's process."""
    run(load_config(SandboxConfig), lifespan)


if __name__ == "__main__":
    main()
