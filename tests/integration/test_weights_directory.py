"""The directory of lent weights, in memory and in etcd alike; and what etcd adds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aetcd import rpc

from perigee.rollout.client import RolloutClient
from perigee.trainer.v1 import trainer_pb2 as pb
from services.coordinator.__main__ import lifespan
from services.coordinator.config import CoordinatorConfig, DirectoryConfig
from services.coordinator.directory import Directory, MemoryDirectory
from services.coordinator.etcd import EtcdClient, EtcdDirectory
from services.coordinator.workers import AWAY, EMPTY, READY, Worker, WorkerRegistry
from services.kit.server import end_tasks, serving
from tests.fixtures.certificates import Certificates
from tests.fixtures.etcd import EtcdServer, require_etcd

FIRST = pb.PublishWeightsResponse(image_id="first", source="trainer:1", bytes=1 << 40)
SECOND = pb.PublishWeightsResponse(image_id="second", source="trainer:1", bytes=1 << 40)


class Registry(WorkerRegistry):
    """Leases of ten seconds, by a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(RolloutClient.connect, lease_seconds=10.0, clock=lambda: self.now)

    def join(self, worker_id: str, status: int = READY) -> Worker:
        """A worker, with its id as its host."""
        return self.register(worker_id, f"{worker_id}:7", 4, 1, status)  # type: ignore[arg-type]


@asynccontextmanager
async def in_etcd(registry: WorkerRegistry, config: DirectoryConfig) -> AsyncIterator[EtcdDirectory]:
    """The directory of a coordinator until its end."""
    directory = EtcdDirectory(registry, config)
    running = asyncio.create_task(directory.run())
    try:
        yield directory
    finally:
        await end_tasks(running)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110, another process makes it true
            await asyncio.sleep(0.02)


@pytest.fixture
async def registry() -> Registry:
    return Registry()


@pytest.fixture(params=["memory", "etcd"])
async def directory(request: pytest.FixtureRequest, registry: Registry) -> AsyncIterator[Directory]:
    if request.param == "memory":
        yield MemoryDirectory(registry)
        return
    server: EtcdServer = request.getfixturevalue("etcd")
    async with in_etcd(registry, server.config()) as directory:
        yield directory


async def test_the_newest_export_is_found_by_run_and_version(directory: Directory) -> None:
    assert directory.find("run", 0) is None
    directory.publish("run", 0, FIRST)
    assert directory.find("run", 0) == FIRST
    assert directory.find("run", 1) is directory.find("other", 0) is None
    directory.publish("run", 1, SECOND)
    assert directory.find("run", 0) is None
    assert directory.find("run", 1) == SECOND


async def test_holders_are_those_of_the_newest_export_in_their_order(directory: Directory, registry: Registry) -> None:
    workers = [registry.join(name) for name in ("b", "a", "c")]
    directory.publish("run", 1, FIRST)
    for worker in (*workers, workers[0]):
        directory.add("first", worker)
    # The trainer that is asked again answers the same.
    directory.publish("run", 1, FIRST)
    assert directory.holders("first") == ["b:7", "a:7", "c:7"]
    directory.publish("run", 2, SECOND)
    directory.add("first", workers[0])
    directory.add("second", workers[1])
    assert directory.holders("first") == []
    assert directory.holders("second") == ["a:7"]


async def test_a_worker_without_its_lease_lends_nothing(directory: Directory, registry: Registry) -> None:
    directory.publish("run", 1, FIRST)
    silent, restarted, leaving = [registry.join(name) for name in ("silent", "restarted", "leaving")]
    for worker in (silent, restarted, leaving):
        directory.add("first", worker)
    registry.now += 6
    registry.join("restarted", EMPTY)
    registry.deregister("leaving", leaving.lease_epoch)
    assert directory.holders("first") == ["silent:7"]
    registry.now += 6
    assert registry.expire() == [silent]
    assert directory.holders("first") == []
    # One that came back before its pull ended is recorded by its registration, not by its name.
    directory.add("first", restarted)
    assert directory.holders("first") == []


async def test_a_coordinator_that_starts_again_knows_who_lends(etcd: EtcdServer) -> None:
    config, registry, successor = etcd.config(), Registry(), Registry()
    async with in_etcd(Registry(), config) as other:
        async with in_etcd(registry, config) as first, in_etcd(successor, config) as second:
            first.publish("run", 1, FIRST)
            workers = [registry.join(name) for name in ("adopted", "away", "restarted", "gone", "leaving")]
            for worker in workers:
                first.add("first", worker)
            await until(lambda: len(second.holders("first")) == 5)
            await until(lambda: second.find("run", 1) == FIRST)
            registry.deregister("leaving", workers[-1].lease_epoch)
            successor.join("restarted", EMPTY)
            successor.join("away", AWAY)
            await until(lambda: sorted(second.holders("first")) == ["adopted:7", "away:7", "gone:7"])
            await until(lambda: other.find("run", 1) == FIRST)
            second.publish("run", 1, FIRST)
            second.add("first", successor.join("adopted"))
            assert second.holders("first")[0] == "adopted:7"
            # After a version of its own, one that another had is of an iteration that was rolled back.
            second.publish("run", 0, SECOND)
            assert second.find("run", 1) is None
        # Both have ended, and what they wrote ends with their leases.
        await until(lambda: other.find("run", 1) is None and not other.holders("first"))


async def test_a_coordinator_has_its_directory_in_etcd_where_that_is_configured(etcd: EtcdServer) -> None:
    config = etcd.config()
    section = config.model_dump(exclude={"password"})
    async with EtcdClient(config) as client:

        async def list_leases() -> set[int]:
            response = await rpc.LeaseStub(client.channel).LeaseLeases(rpc.LeaseLeasesRequest())
            return {lease.ID for lease in response.leases}

        before = await list_leases()
        async with serving(CoordinatorConfig.model_validate({"directory": section}), lifespan), asyncio.timeout(60):
            while not await list_leases() - before:  # noqa: ASYNC110
                await asyncio.sleep(0.02)


async def test_etcd_with_tls_and_users_may_be_away(tmp_path: Path, certificates: Certificates) -> None:
    require_etcd()
    server = EtcdServer(tmp_path, ("--cert-file", certificates.certificate, "--key-file", certificates.key), "https")
    try:
        server.start()
        config = server.config(ca_file=certificates.ca, user="root", password="secret")
        async with EtcdClient(config) as client:
            await client._keys.Put(rpc.PutRequest(key=f"{config.prefix}/exports/run/9".encode(), value=b"\xff"))
            users = rpc.AuthStub(client.channel)
            await users.UserAdd(rpc.AuthUserAddRequest(name="root", password="secret"))
            await users.UserGrantRole(rpc.AuthUserGrantRoleRequest(user="root", role="root"))
            await users.AuthEnable(rpc.AuthEnableRequest())
        async with in_etcd(Registry(), config) as first, in_etcd(Registry(), config) as second:
            first.publish("run", 1, FIRST)
            await until(lambda: second.find("run", 1) == FIRST)
            assert second.find("run", 9) is None
            server.kill()
            first.publish("run", 2, SECOND)
            assert first.find("run", 2) == SECOND
            server.start()
            # It has forgotten who logged in, and is told anew.
            await until(lambda: second.find("run", 2) == SECOND)
    finally:
        server.kill()
