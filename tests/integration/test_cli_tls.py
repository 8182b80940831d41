"""Commands that call services, over TLS with client certificates and tokens, and what they say when refused."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest

from perigee.buffer.v1 import buffer_pb2
from perigee.cli.stack import check_health, local_channel
from perigee.coordinator.v1 import coordinator_pb2
from perigee.coordinator.v1.coordinator_pb2_grpc import (
    CoordinatorServiceServicer,
    add_CoordinatorServiceServicer_to_server,
)
from perigee.reward.v1 import reward_pb2
from perigee.reward.v1.reward_pb2_grpc import RewardServiceServicer, add_RewardServiceServicer_to_server
from perigee.rpc import VARIABLES
from perigee.sandbox.v1 import sandbox_pb2
from perigee.sandbox.v1.sandbox_pb2_grpc import SandboxServiceServicer, add_SandboxServiceServicer_to_server
from services.kit.config import ServerConfig, ServiceConfig
from services.kit.server import App, serving
from tests.fixtures.certificates import Certificates
from tests.fixtures.cli import run_perigee

CLI = Path(__file__).parents[2] / "perigee" / "cli"
CONNECTING = re.compile(r"insecure_channel|Client\.connect\((?!app\.address\))")


class ProbeConfig(ServiceConfig):
    section: ClassVar[str] = "probe"


class Coordinator(CoordinatorServiceServicer):
    async def GetStatus(self, request: Any, context: Any) -> coordinator_pb2.GetStatusResponse:
        return coordinator_pb2.GetStatusResponse()


class Reward(RewardServiceServicer):
    async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> AsyncIterator[reward_pb2.ScoreResponse]:
        for item in request.items:
            yield reward_pb2.ScoreResponse(id=item.id, verdict=buffer_pb2.VERDICT_CORRECT, reward=1.0)


class Sandbox(SandboxServiceServicer):
    async def ListRuntimes(self, request: Any, context: Any) -> sandbox_pb2.ListRuntimesResponse:
        return sandbox_pb2.ListRuntimesResponse()


@asynccontextmanager
async def lifespan(app: App[ProbeConfig]) -> AsyncIterator[None]:
    app.add("perigee.coordinator.v1.CoordinatorService", add_CoordinatorServiceServicer_to_server, Coordinator())  # type: ignore[abstract]
    app.add("perigee.reward.v1.RewardService", add_RewardServiceServicer_to_server, Reward())  # type: ignore[abstract]
    app.add("perigee.sandbox.v1.SandboxService", add_SandboxServiceServicer_to_server, Sandbox())  # type: ignore[abstract]
    yield


@pytest.fixture
async def address(certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    for variable in VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("perigee.cli.metrics.CALL_TIMEOUT_S", 60.0)
    monkeypatch.setattr("perigee.cli.stack.HEALTH_TIMEOUT_S", 60.0)
    server = ServerConfig(
        token="own",
        callers={"team": {"tokens": ["theirs"], "audiences": ["sandbox"]}},
        tls_cert_file=certificates.certificate,
        tls_key_file=certificates.key,
        tls_ca_file=certificates.ca,
        drain_seconds=0,
    )
    async with serving(ProbeConfig(server=server), lifespan) as app:
        yield app.address


def connection(certificates: Certificates, **changed: str) -> list[str]:
    """Options of a connection that is served, but for what is changed; an empty value leaves one out."""
    c = certificates
    values = {"token": "own", "ca-file": c.ca, "cert-file": c.certificate, "key-file": c.key}
    values |= {name.replace("_", "-"): value for name, value in changed.items()}
    return [part for name, value in values.items() if value for part in (f"--{name}", value)]


async def test_commands_speak_mutual_tls(address: str, certificates: Certificates, tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    items.write_text('{"verifier": "exact", "answer": "4", "response": "4"}\n')
    for command in (
        ("status", "--coordinator", address),
        ("sandbox", "runtimes", "--address", address),
        ("reward", "score", str(items), "--address", address),
    ):
        ended = await run_perigee(*command, *connection(certificates))
        assert (ended.code, ended.stderr) == (0, "")


async def test_the_environment_serves_too(address: str, certificates: Certificates, tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("own\nolder\n")
    files = {"TOKEN": str(token_file), "CA": certificates.ca, "CERT": certificates.certificate, "KEY": certificates.key}
    environment = {f"PERIGEE_{name}_FILE": path for name, path in files.items()}
    ended = await run_perigee("status", "--coordinator", address, **environment)
    assert ended.code == 0
    # What is given goes before it.
    ended = await run_perigee("status", "--coordinator", address, "--token", "other", **environment)
    assert ended.stderr == "perigee: The call carries no valid bearer token: set PERIGEE_TOKEN to one.\n"


async def test_a_stack_is_reached_as_its_services_reach_one_another(address: str, certificates: Certificates) -> None:
    c = certificates
    server = {"token": "own", "tls_cert_file": c.certificate, "tls_key_file": c.key, "tls_ca_file": c.ca}
    assert await check_health(address, "", local_channel(server)) == "SERVING"
    assert await check_health(address, "", local_channel({})) == "UNAVAILABLE"


async def test_a_refusal_is_one_sentence(address: str, certificates: Certificates) -> None:
    c = certificates
    for options, code, sentence in (
        (connection(c, token="theirs"), 1, "The token of team is for sandbox; probe asks for one for control."),
        (connection(c, token=""), 1, "The call carries no valid bearer token: set PERIGEE_TOKEN to one."),
        (connection(c, key_file=""), 2, "cert_file, key_file: are given together or not at all"),
        (connection(c, ca_file="/nowhere.pem"), 2, "/nowhere.pem: cannot be read: No such file or directory"),
        (
            connection(c, cert_file=c.expired),
            1,
            f"{address} refuses the client certificate {c.expired}: it has expired",
        ),
    ):
        ended = await run_perigee("status", "--coordinator", address, *options)
        assert (ended.code, ended.stderr) == (code, f"perigee: {sentence}\n")


def test_no_command_connects_by_itself() -> None:
    """Every channel is made of the options that `connecting` gives, or of a recipe's `server` section, or leads to a
    service in the same process."""
    sources = {path.name: path.read_text() for path in CLI.rglob("*.py")}
    assert [name for name, text in sources.items() if CONNECTING.search(text)] == []
