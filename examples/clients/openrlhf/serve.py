"""Serves OpenRLHF's remote reward endpoint in front of a Perigee reward service.

python serve.py --reward HOST:PORT [--host HOST] [--port PORT]
"""

import argparse
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI

from perigee.reward.client import RewardClient
from perigee.rpc import ChannelOptions
from services.reward.compat.openrlhf import make_router


class Connection:
    """A client that is made when the server's event loop runs."""

    def __init__(self, address: str, token: str | None) -> None:
        self._address = address
        self._token = token
        self._client: RewardClient | None = None

    def score(self, request, *, timeout_s):  # type: ignore[no-untyped-def]
        """Outcomes of the reward service."""
        assert self._client is not None
        return self._client.score(request, timeout_s=timeout_s)

    @asynccontextmanager
    async def lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        """Connects for as long as the server runs."""
        async with RewardClient(self._address, ChannelOptions(token=self._token)) as self._client:
            yield


def make_app(address: str, token: str | None) -> FastAPI:
    """The application."""
    connection = Connection(address, token)
    app = FastAPI(title="Perigee reward for OpenRLHF", lifespan=connection.lifespan)
    app.include_router(make_router(connection))
    return app


def main() -> None:
    """Reads the command line and serves."""
    parser = argparse.ArgumentParser(description="OpenRLHF's remote reward endpoint for a Perigee reward service.")
    parser.add_argument("--reward", default=os.environ.get("PERIGEE_REWARD_ADDRESS", "127.0.0.1:50055"))
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8055)
    arguments = parser.parse_args()
    app = make_app(arguments.reward, os.environ.get("PERIGEE_TOKEN"))
    uvicorn.run(app, host=arguments.host, port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
