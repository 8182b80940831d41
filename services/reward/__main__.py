"""Starts the reward service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from perigee.reward.v1.reward_pb2_grpc import add_RewardServiceServicer_to_server
from perigee.sandbox.client import SandboxClient
from services.kit.config import load_config
from services.kit.http import http_serving
from services.kit.server import App, run
from services.reward.config import RewardConfig
from services.reward.http_routes import OPENAPI_FILE, ROUTES, compat_routers
from services.reward.registry import open_scorer
from services.reward.service import FULL_NAME, RewardService


@asynccontextmanager
async def lifespan(app: App[RewardConfig]) -> AsyncIterator[None]:
    """Runs the verifiers for as long as the service runs."""
    config = app.config
    async with open_scorer(config, app.connect(SandboxClient, config.sandbox_address)) as scorer:
        service = RewardService(scorer, config)
        app.add(FULL_NAME, add_RewardServiceServicer_to_server, service)
        async with http_serving(app, config.http, ROUTES, service, OPENAPI_FILE, compat_routers(service)):
            app.set_ready(FULL_NAME, True)
            yield


def main() -> None:
    """Runs the service's process."""
    run(load_config(RewardConfig), lifespan)


if __name__ == "__main__":
    main()
