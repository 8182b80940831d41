"""`perigee worker`: what it starts, and how it ends."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from perigee.cli.ending import Interrupt
from perigee.cli.run_folder import RunFolder, StackFile
from perigee.cli.stack import ServiceSpec, wait_serving
from perigee.cli.view import PlainView
from perigee.cli.worker import export_credentials, plan_worker, work
from perigee.coordinator.v1 import coordinator_pb2 as pb
from perigee.coordinator.v1.coordinator_pb2_grpc import (
    CoordinatorServiceServicer,
    add_CoordinatorServiceServicer_to_server,
)
from perigee.errors import UnavailableError
from perigee.rpc import ChannelOptions
from services.coordinator.__main__ import lifespan
from services.coordinator.config import CoordinatorConfig
from services.kit.server import serving
from tests.fixtures.cli import invoke
from tests.fixtures.coordinator_fakes import fake_server
from tests.integration.test_cli_stack import SERVICE

STATUS = pb.GetStatusResponse(buffer_address="127.0.0.1:52", trainer_address="trainer.example:54")


def read_section(spec: ServiceSpec) -> dict[str, object]:
    section: dict[str, object] = yaml.safe_load(Path(spec.command[-1]).read_text())["rollout"]
    return section


def plan(folder: Path, coordinator: str) -> ServiceSpec:
    """A worker that only answers health checks, and does not start where the file `broken` exists."""
    spec = plan_worker(coordinator, STATUS, {"worker_id": "w"}, folder, is_of_run=False)
    return replace(spec, command=[sys.executable, "-c", SERVICE, spec.address, str(folder / "broken")])


async def start(spec: ServiceSpec, coordinator: str) -> None:
    task = asyncio.current_task()
    assert task is not None
    await work(spec, coordinator, ChannelOptions(), PlainView(), Interrupt(task))


def test_a_worker_dials_what_the_coordinator_dials_from_where_it_is(tmp_path: Path) -> None:
    spec = plan_worker("gpu-7:51", STATUS, {"max_num_seqs": 8, "worker_id": "w"}, tmp_path, is_of_run=False)
    section = read_section(spec)
    assert section | {"server": {}} == {
        "max_num_seqs": 8,
        "worker_id": "w",
        "coordinator_address": "gpu-7:51",
        "buffer_address": "gpu-7:52",
        "trainer_address": "trainer.example:54",
        "server": {},
    }
    # Coordinator and trainer are elsewhere and must reach it.
    assert section["server"] == {"host": "0.0.0.0", "port": int(spec.address.rpartition(":")[2])}


def test_beside_a_runs_own_workers_it_takes_none_of_their_ports(tmp_path: Path) -> None:
    values = {
        "server": {"port": 1, "metrics_port": 2, "token": "t"},
        "http": {"port": 3},
        "buffer_address": "buffer.example:52",
    }
    section = read_section(plan_worker("127.0.0.1:51", STATUS, values, tmp_path, is_of_run=True))
    assert section["server"] == {"token": "t", "port": section["server"]["port"]}  # type: ignore[index]
    assert section["http"] == {}
    assert section["buffer_address"] == "127.0.0.1:52"


def test_it_speaks_tls_with_what_reaches_the_coordinator_unless_its_recipe_names_more(tmp_path: Path) -> None:
    channel = ChannelOptions(ca_file="ca", cert_file="cert", key_file="key")
    values = {"worker_id": "w", "server": {"tls_ca_file": "other"}}
    spec = plan_worker("gpu-7:51", STATUS, values, tmp_path, is_of_run=False, channel=channel)
    server = read_section(spec)["server"]
    assert server == server | {"tls_ca_file": "other", "tls_cert_file": "cert", "tls_key_file": "key"}  # type: ignore[operator]
    assert spec.channel == ChannelOptions(ca_file="other", cert_file="cert", key_file="key")


def test_it_is_asked_where_it_listens(tmp_path: Path) -> None:
    for host, reached in (("0.0.0.0", "127.0.0.1:7"), ("10.0.0.5", "10.0.0.5:7"), ("fd00::5", "[fd00::5]:7")):
        values = {"worker_id": "w", "server": {"host": host, "port": 7}}
        assert plan_worker("gpu-7:51", STATUS, values, tmp_path, is_of_run=False).address == reached


def test_its_token_is_the_one_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERIGEE_TOKEN", "another")
    monkeypatch.setenv("PERIGEE_TOKEN_FILE", "another")
    export_credentials(ChannelOptions())
    assert os.environ["PERIGEE_TOKEN"] == "another"
    export_credentials(ChannelOptions(token="given"))
    assert ChannelOptions.from_environment() == ChannelOptions(token="given")


def test_a_stack_without_a_coordinator_is_none_to_join(tmp_path: Path) -> None:
    RunFolder(tmp_path / "up").write_stack(StackFile(os.getpid(), {"buffer": "127.0.0.1:1"}))
    ended = invoke(("worker", "--runs-dir", str(tmp_path)), None, None, {"COLUMNS": "200"})
    assert ended.code != 0
    assert "has a coordinator; name one: --coordinator HOST:PORT" in ended.stderr


class EndedCoordinator(CoordinatorServiceServicer):
    """A coordinator whose run has ended, and which is then cut."""

    def __init__(self) -> None:
        self.watched = asyncio.Event()

    async def WatchRun(self, request: pb.WatchRunRequest, context: Any) -> AsyncIterator[pb.WatchRunResponse]:
        yield pb.WatchRunResponse(run=pb.RunSnapshot(phase=pb.RUN_PHASE_FINISHED))
        self.watched.set()


async def test_it_ends_when_its_run_has_and_the_coordinator_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = EndedCoordinator()
    async with fake_server(add_CoordinatorServiceServicer_to_server, ended) as address:
        working = asyncio.create_task(start(plan(tmp_path, address), address))
        async with asyncio.timeout(60):
            await ended.watched.wait()
    async with asyncio.timeout(60):
        await working
    assert "the run has ended, and its coordinator with it\nw has ended\n" in capsys.readouterr().out


async def test_it_ends_with_its_process_and_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with serving(CoordinatorConfig(), lifespan) as app:
        spec = plan(tmp_path, app.address)
        working = asyncio.create_task(start(spec, app.address))
        async with asyncio.timeout(60):
            await wait_serving(spec.address, "", ChannelOptions())
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        (tmp_path / "broken").touch()
        with pytest.raises(UnavailableError, match=r"w ended with exit code 1: ValueError: broken"):
            await start(spec, app.address)
    assert capsys.readouterr().out.count("w has ended") == 2
