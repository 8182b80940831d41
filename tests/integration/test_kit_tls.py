"""TLS between services: server certificates, client certificates, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import pytest

from perigee.errors import UnavailableError
from perigee.reward.client import RewardClient
from perigee.reward.v1 import reward_pb2 as pb
from perigee.reward.v1.reward_pb2_grpc import RewardServiceServicer, add_RewardServiceServicer_to_server
from perigee.rpc import ChannelOptions
from services.kit.config import ServerConfig, ServiceConfig
from services.kit.server import App, serving
from tests.fixtures.certificates import Certificates


class ProbeConfig(ServiceConfig):
    section: ClassVar[str] = "probe"


class Probe(RewardServiceServicer):
    async def ListVerifiers(self, request: pb.ListVerifiersRequest, context: Any) -> pb.ListVerifiersResponse:
        return pb.ListVerifiersResponse()


@asynccontextmanager
async def tls_server(certificates: Certificates, ca_file: str | None) -> AsyncIterator[App[ProbeConfig]]:
    @asynccontextmanager
    async def lifespan(app: App[ProbeConfig]) -> AsyncIterator[None]:
        app.add("perigee.reward.v1.RewardService", add_RewardServiceServicer_to_server, Probe())
        yield

    server = ServerConfig(
        tls_cert_file=certificates.certificate, tls_key_file=certificates.key, tls_ca_file=ca_file, drain_seconds=0
    )
    async with serving(ProbeConfig(server=server), lifespan) as app:
        yield app


async def test_a_client_that_trusts_the_authority_is_served(certificates: Certificates) -> None:
    async with (
        tls_server(certificates, None) as app,
        RewardClient.connect(app.address, ca_file=certificates.ca) as client,
    ):
        await client.list_verifiers(pb.ListVerifiersRequest())


async def test_a_client_in_clear_is_not_served(certificates: Certificates) -> None:
    async with tls_server(certificates, None) as app, RewardClient.connect(app.address) as client:
        with pytest.raises(UnavailableError):
            await client.list_verifiers(pb.ListVerifiersRequest(), timeout_s=3)


async def test_with_an_authority_the_server_wants_the_clients_certificate(certificates: Certificates) -> None:
    async with tls_server(certificates, certificates.ca) as app:
        async with RewardClient.connect(app.address, ca_file=certificates.ca) as stranger:
            with pytest.raises(UnavailableError):
                await stranger.list_verifiers(pb.ListVerifiersRequest(), timeout_s=3)
        options = ChannelOptions(ca_file=certificates.ca, cert_file=certificates.certificate, key_file=certificates.key)
        async with RewardClient(app.address, options) as peer:
            await peer.list_verifiers(pb.ListVerifiersRequest())
        await app.connect(RewardClient, app.address).list_verifiers(pb.ListVerifiersRequest())
