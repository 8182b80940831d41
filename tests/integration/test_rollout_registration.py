"""The worker's lease, kept at a coordinator that loses leases and goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from perigee.coordinator.client import CoordinatorClient
from perigee.coordinator.v1 import coordinator_pb2 as pb
from perigee.coordinator.v1.coordinator_pb2_grpc import (
    CoordinatorServiceServicer,
    add_CoordinatorServiceServicer_to_server,
)
from services.rollout.model import open_policy
from services.rollout.registration import keep_registered
from services.rollout.worker import EMPTY, READY, STARTING, Worker
from tests.fixtures.rollout import rollout_config
from tests.fixtures.rollout_engine import FragileEngine


class Ledger(CoordinatorServiceServicer):
    """Grants leases of 0.3 s and writes down every call."""

    def __init__(self) -> None:
        self.calls: asyncio.Queue[Any] = asyncio.Queue()
        self.epoch = 0

    async def RegisterWorker(self, request: pb.RegisterWorkerRequest, context: Any) -> pb.RegisterWorkerResponse:
        self.epoch += 1
        self.calls.put_nowait(request)
        return pb.RegisterWorkerResponse(lease_epoch=self.epoch, lease_seconds=0.3)

    async def RenewLease(self, request: pb.RenewLeaseRequest, context: Any) -> pb.RenewLeaseResponse:
        self.calls.put_nowait(request)
        if request.lease_epoch != self.epoch:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such lease")
        return pb.RenewLeaseResponse(lease_seconds=0.3)

    async def DeregisterWorker(self, request: pb.DeregisterWorkerRequest, context: Any) -> pb.DeregisterWorkerResponse:
        self.calls.put_nowait(request)
        return pb.DeregisterWorkerResponse()

    async def next(self, kind: type[Any]) -> Any:
        """The next call of this kind; others before it are passed over."""
        async with asyncio.timeout(60):
            while not isinstance(call := await self.calls.get(), kind):
                pass
        return call


@asynccontextmanager
async def serving_ledger(ledger: Ledger, port: int = 0) -> AsyncIterator[int]:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    add_CoordinatorServiceServicer_to_server(ledger, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


@asynccontextmanager
async def registered(worker: Worker, port: int) -> AsyncIterator[None]:
    async with CoordinatorClient.connect(f"127.0.0.1:{port}") as client:
        task = asyncio.create_task(keep_registered(worker, client, "host:1"))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])


def make_worker(folder: Path) -> Worker:
    config = rollout_config(folder, "127.0.0.1:1", registration={"retry_seconds": 0.05, "timeout_seconds": 60.0})
    return Worker(config, open_policy(str(folder), None), FragileEngine(), "w")


async def test_a_worker_registers_when_its_engine_runs_and_renews(policy_folder: Path) -> None:
    worker, ledger = make_worker(policy_folder), Ledger()
    async with serving_ledger(ledger) as port, registered(worker, port):
        await asyncio.sleep(0.05)
        assert ledger.calls.empty()
        worker.set_status(EMPTY)
        call = await ledger.next(pb.RegisterWorkerRequest)
        assert (call.worker_id, call.address, call.capacity, call.ready) == ("w", "host:1", 64, False)
        worker.set_status(READY, "run", 3)
        call = await ledger.next(pb.RenewLeaseRequest)
        assert (call.lease_epoch, call.policy_version, call.ready) == (1, 3, True)
        worker.set_status(STARTING)
        assert not (await ledger.next(pb.RenewLeaseRequest)).ready


async def test_a_lost_lease_is_followed_by_a_new_registration(policy_folder: Path) -> None:
    worker, ledger = make_worker(policy_folder), Ledger()
    worker.set_status(READY, "run", 3)
    async with serving_ledger(ledger) as port, registered(worker, port):
        await ledger.next(pb.RegisterWorkerRequest)
        ledger.epoch = 7
        again = await ledger.next(pb.RegisterWorkerRequest)
        assert (again.policy_version, again.ready) == (3, True)
        assert (await ledger.next(pb.RenewLeaseRequest)).lease_epoch == 8


async def test_a_coordinator_that_starts_again_gets_its_worker_back(policy_folder: Path) -> None:
    worker, first, second = make_worker(policy_folder), Ledger(), Ledger()
    worker.set_status(READY, "run", 3)
    async with serving_ledger(first) as port:
        keeping = registered(worker, port)
        await keeping.__aenter__()
        await first.next(pb.RenewLeaseRequest)
    second.epoch = 40
    async with serving_ledger(second, port):
        await second.next(pb.RegisterWorkerRequest)
        assert (await second.next(pb.RenewLeaseRequest)).lease_epoch == 41
        await keeping.__aexit__(None, None, None)
        assert (await second.next(pb.DeregisterWorkerRequest)).lease_epoch == 41
