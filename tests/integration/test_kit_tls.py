"""TLS between services: server certificates, client certificates, and what is refused."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest

from perigee.errors import InvalidArgumentError, UnavailableError
from perigee.reload import read_file
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
    release: ClassVar[asyncio.Event]

    async def Score(self, request: pb.ScoreRequest, context: Any) -> AsyncIterator[pb.ScoreResponse]:
        if request.items:
            yield pb.ScoreResponse(id="wait")
            await self.release.wait()
        yield pb.ScoreResponse(id="done")


@asynccontextmanager
async def tls_server(server: ServerConfig) -> AsyncIterator[App[ProbeConfig]]:
    @asynccontextmanager
    async def lifespan(app: App[ProbeConfig]) -> AsyncIterator[None]:
        app.add("perigee.reward.v1.RewardService", add_RewardServiceServicer_to_server, Probe())
        yield

    async with serving(ProbeConfig(server=server), lifespan) as app:
        yield app


def server_config(certificates: Certificates, **changed: Any) -> ServerConfig:
    """A server that wants the certificates of its callers."""
    files = {
        "tls_cert_file": certificates.certificate,
        "tls_key_file": certificates.key,
        "tls_ca_file": certificates.ca,
    }
    return ServerConfig(**{**files, "drain_seconds": 0, **changed})


def channel_options(certificates: Certificates, **changed: str | None) -> ChannelOptions:
    """A client with a certificate of its own."""
    files = {"ca_file": certificates.ca, "cert_file": certificates.certificate, "key_file": certificates.key}
    return ChannelOptions(**files | changed)  # type: ignore[arg-type]


async def call(client: RewardClient) -> None:
    """Makes a call that is not retried, so that a refusal takes no time."""
    async for _ in client.score(pb.ScoreRequest(), timeout_s=60):
        pass


def write_file(path: str, content: bytes) -> None:
    Path(path).write_bytes(content)


async def refusal(address: str, options: ChannelOptions) -> str:
    async with RewardClient(address, options) as client:
        with pytest.raises(UnavailableError) as refused:
            await call(client)
    return refused.value.message


async def test_with_an_authority_the_server_wants_the_clients_certificate(certificates: Certificates) -> None:
    c = certificates
    async with tls_server(server_config(c)) as app:
        async with RewardClient(app.address, channel_options(c)) as peer:
            await call(peer)
        await call(app.connect(RewardClient, app.address))
        refused = f"{app.address} refuses the client certificate"
        for options, reason in (
            (ChannelOptions(), f"{app.address} speaks TLS: name the roots that signed its certificate (ca_file)"),
            (ChannelOptions(ca_file=c.ca), f"{app.address} wants a client certificate: name one (cert_file, key_file)"),
            (channel_options(c, cert_file=c.expired), f"{refused} {c.expired}: it has expired"),
            (channel_options(c, cert_file=c.foreign), f"{refused} {c.foreign}: the roots in {c.ca} have not signed it"),
        ):
            assert await refusal(app.address, options) == reason


async def test_a_server_with_the_wrong_certificate_is_refused(certificates: Certificates) -> None:
    c = certificates
    its = "the certificate of {}"
    for changed, reason in (
        ({"tls_cert_file": c.expired}, f"{its} has expired"),
        ({"tls_cert_file": c.foreign}, f"{its} is not signed by the roots in {c.ca}"),
        ({"tls_cert_file": c.other_name}, f"{its} is for another name"),
        ({"tls_cert_file": None, "tls_key_file": None}, "{} does not speak TLS: leave out the roots (ca_file)"),
    ):
        async with tls_server(server_config(c, tls_verify_clients=False, **changed)) as app:
            assert (await refusal(app.address, ChannelOptions(ca_file=c.ca))).startswith(reason.format(app.address))


async def test_a_name_may_stand_for_the_address(certificates: Certificates) -> None:
    config = server_config(certificates, tls_cert_file=certificates.other_name, tls_server_name="perigee")
    async with tls_server(config) as app:
        await call(app.connect(RewardClient, app.address))


async def test_replaced_certificates_are_used_without_a_break(
    certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Server and client change their authority, and a call goes on all the while."""
    c = certificates
    names = {"ca_file": c.ca, "cert_file": c.certificate, "key_file": c.key}
    files = {name: str(shutil.copy(path, tmp_path / name)) for name, path in names.items()}
    monkeypatch.setattr("services.kit.tls.HANDOVER_S", 0.01)
    release = asyncio.Event()
    config = server_config(c, **{f"tls_{name}": path for name, path in files.items()})
    async with tls_server(config) as app, RewardClient(app.address, ChannelOptions(**files)) as client:
        Probe.release = release
        waiting = client.score(pb.ScoreRequest(items=[pb.ScoreItem(id="wait")]), timeout_s=60)
        assert (await anext(waiting)).id == "wait"
        write_file(files["ca_file"], read_file(c.ca) + read_file(c.other_ca))
        await call(client)
        shutil.copy(c.foreign, files["cert_file"])
        await call(client)
        shutil.copy(c.other_ca, files["ca_file"])
        await call(client)
        assert "not signed by the roots" in await refusal(app.address, channel_options(c))
        shutil.copy(c.key, files["cert_file"])  # no certificate: what was read before is kept
        await call(client)
        release.set()
        assert [response.id async for response in waiting] == ["done"]


async def test_a_file_that_is_no_certificate_is_named(certificates: Certificates) -> None:
    with pytest.raises(InvalidArgumentError, match=r"leaf\.key: is no PEM certificate of the private key in"):
        async with tls_server(server_config(certificates, tls_cert_file=certificates.key)):
            pass
