"""CoordinatorService: protobuf in, domain call, protobuf out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from perigee.coordinator.v1 import coordinator_pb2 as pb
from perigee.coordinator.v1.coordinator_pb2_grpc import CoordinatorServiceServicer
from services.coordinator.runs import Runs
from services.coordinator.snapshot import worker_snapshots
from services.coordinator.watching import Told
from services.coordinator.workers import WorkerRegistry

if TYPE_CHECKING:
    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]


class CoordinatorService(CoordinatorServiceServicer):
    """Serves registrations and runs."""

    def __init__(self, registry: WorkerRegistry, runs: Runs) -> None:
        self._registry = registry
        self._runs = runs

    async def RegisterWorker(self, request: pb.RegisterWorkerRequest, context: Context) -> pb.RegisterWorkerResponse:
        """See the contract."""
        worker = self._registry.register(
            request.worker_id, request.address, request.capacity, request.policy_version, request.ready
        )
        return pb.RegisterWorkerResponse(lease_epoch=worker.lease_epoch, lease_seconds=self._registry.lease_seconds)

    async def RenewLease(self, request: pb.RenewLeaseRequest, context: Context) -> pb.RenewLeaseResponse:
        """See the contract."""
        self._registry.renew(
            request.worker_id, request.lease_epoch, request.running, request.policy_version, request.ready
        )
        return pb.RenewLeaseResponse(lease_seconds=self._registry.lease_seconds)

    async def DeregisterWorker(
        self, request: pb.DeregisterWorkerRequest, context: Context
    ) -> pb.DeregisterWorkerResponse:
        """See the contract."""
        self._registry.deregister(request.worker_id, request.lease_epoch)
        return pb.DeregisterWorkerResponse()

    async def StartRun(self, request: pb.StartRunRequest, context: Context) -> pb.StartRunResponse:
        """See the contract."""
        resumed = await self._runs.start(request.run_id, request.config_yaml, request.run_path)
        return pb.StartRunResponse(run_id=request.run_id, resumed=resumed)

    async def StopRun(self, request: pb.StopRunRequest, context: Context) -> pb.StopRunResponse:
        """See the contract."""
        await self._runs.stop(request.run_id)
        return pb.StopRunResponse()

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:
        """See the contract."""
        board = self._runs.board(request.run_id) if request.run_id else self._runs.newest()
        response = pb.GetStatusResponse(workers=worker_snapshots(self._registry))
        if board is not None:
            response.run.CopyFrom(board.snapshot())
        return response

    async def WatchRun(self, request: pb.WatchRunRequest, context: Context) -> AsyncIterator[pb.WatchRunResponse]:
        """See the contract."""
        told = Told(
            request.after_iteration if request.HasField("after_iteration") else None,
            request.after_evaluation if request.HasField("after_evaluation") else None,
        )
        async with aclosing(self._runs.watch(request.run_id, told)) as responses:
            async for response in responses:
                yield response
