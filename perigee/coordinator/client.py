"""Typed client of the coordinator."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from perigee.coordinator.v1 import coordinator_pb2 as pb
from perigee.coordinator.v1.coordinator_pb2_grpc import CoordinatorServiceStub
from perigee.rpc import ChannelOptions, ServiceClient
from perigee.trainer.client import send_file
from perigee.trainer.v1.trainer_pb2 import FilePiece

if TYPE_CHECKING:
    from perigee.coordinator.v1.coordinator_pb2_grpc import CoordinatorServiceAsyncStub


class CoordinatorClient(ServiceClient):
    """Client of the coordinator (`perigee.coordinator.v1.CoordinatorService`)."""

    service_name = "perigee.coordinator.v1.CoordinatorService"
    idempotent = ("RegisterWorker", "RenewLease", "DeregisterWorker", "StartRun", "StopRun", "GetStatus", "PutFile")

    def __init__(self, target: str, options: ChannelOptions = ChannelOptions()) -> None:
        super().__init__(target, options)
        self._stub: CoordinatorServiceAsyncStub = CoordinatorServiceStub(self.channel)

    async def register_worker(
        self, request: pb.RegisterWorkerRequest, *, timeout_s: float = 20.0
    ) -> pb.RegisterWorkerResponse:
        """Registers a rollout worker: when it starts, and again after its lease is lost."""
        return await self._unary(self._stub.RegisterWorker, request, timeout_s)

    async def renew_lease(self, request: pb.RenewLeaseRequest, *, timeout_s: float = 20.0) -> pb.RenewLeaseResponse:
        """Renews a lease and reports the worker's state; NotFoundError when the lease is lost: register again."""
        return await self._unary(self._stub.RenewLease, request, timeout_s)

    async def deregister_worker(
        self, request: pb.DeregisterWorkerRequest, *, timeout_s: float = 20.0
    ) -> pb.DeregisterWorkerResponse:
        """Ends the lease."""
        return await self._unary(self._stub.DeregisterWorker, request, timeout_s)

    async def start_run(self, request: pb.StartRunRequest, *, timeout_s: float = 20.0) -> pb.StartRunResponse:
        """Starts a run, or resumes it when the buffer knows it; goes on past the deadline, and the same call joins."""
        return await self._unary(self._stub.StartRun, request, timeout_s)

    async def put_file(self, path: Path, run_id: str, run_path: str, *, timeout_s: float = 60.0) -> str:
        """Sends a file of a run, unless the coordinator has it; returns its path there. `timeout_s` bounds a piece."""

        async def put(piece: FilePiece) -> str:
            request = pb.PutFileRequest(run_id=run_id, run_path=run_path, piece=piece)
            return (await self._unary(self._stub.PutFile, request, timeout_s)).path

        return await send_file(path, put)

    async def stop_run(self, request: pb.StopRunRequest, *, timeout_s: float = 20.0) -> pb.StopRunResponse:
        """Ends the run, or its start, at once; the buffer keeps what is needed to resume it."""
        return await self._unary(self._stub.StopRun, request, timeout_s)

    async def get_status(self, request: pb.GetStatusRequest, *, timeout_s: float = 20.0) -> pb.GetStatusResponse:
        """Returns the state of a run and of the workers."""
        return await self._unary(self._stub.GetStatus, request, timeout_s)

    def watch_run(self, request: pb.WatchRunRequest, *, timeout_s: float = 600.0) -> AsyncIterator[pb.WatchRunResponse]:
        """Streams snapshots of the run, at least one per change of phase, until it ends, and on request its iterations
        and evaluations: each once and in order, the recorded ones first. UnavailableError when the service stops: watch
        again.
        """
        return self._stream(self._stub.WatchRun, request, timeout_s)
