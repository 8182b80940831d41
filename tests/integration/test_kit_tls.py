"""TLS between services: server certificates, client certificates, and what is refused."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from perigee.errors import UnavailableError
from perigee.reward.client import RewardClient
from perigee.reward.v1 import reward_pb2 as pb
from perigee.reward.v1.reward_pb2_grpc import RewardServiceServicer, add_RewardServiceServicer_to_server
from perigee.rpc import ChannelOptions
from services.kit.config import ServerConfig, ServiceConfig
from services.kit.server import App, serving


class ProbeConfig(ServiceConfig):
    section: ClassVar[str] = "probe"


class Probe(RewardServiceServicer):
    async def ListVerifiers(self, request: pb.ListVerifiersRequest, context: Any) -> pb.ListVerifiersResponse:
        return pb.ListVerifiersResponse()


@dataclass(frozen=True)
class Certificates:
    """An authority, and a certificate for 127.0.0.1 that it signed."""

    ca: str
    certificate: str
    key: str


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl: makes the certificates of the TLS tests")
    folder = tmp_path_factory.mktemp("tls")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    for command in (
        "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -subj /CN=authority -days 1",
        "req -newkey rsa:2048 -nodes -keyout leaf.key -out leaf.csr -subj /CN=service",
        "x509 -req -in leaf.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out leaf.pem -days 1 -extfile names",
    ):
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    return Certificates(str(folder / "ca.pem"), str(folder / "leaf.pem"), str(folder / "leaf.key"))


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
