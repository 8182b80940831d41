"""CoordinatorService: protobuf in, domain call, protobuf out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from perigee.coordinator.v1 import coordinator_pb2 as pb
from perigee.coordinator.v1.coordinator_pb2_grpc import CoordinatorServiceServicer
from services.coordinator.config import CoordinatorConfig
from services.coordinator.run_status import Cursor, worker_snapshots
from services.coordinator.runs import Runs
from services.coordinator.workers import EMPTY, READY, WorkerRegistry, WorkerStatus

if TYPE_CHECKING:
    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]


class CoordinatorService(CoordinatorServiceServicer):
    """Serves registrations and runs."""

    def __init__(self, config: CoordinatorConfig, registry: WorkerRegistry, runs: Runs) -> None:
        self._config = config
        self._registry = registry
        self._runs = runs

    async def RegisterWorker(self, request: pb.RegisterWorkerRequest, context: Context) -> pb.RegisterWorkerResponse:
        worker = self._registry.register(
            request.worker_id, request.address, request.capacity, request.policy_version, read_status(request)
        )
        return pb.RegisterWorkerResponse(lease_epoch=worker.lease_epoch, lease_seconds=self._registry.lease_seconds)

    async def RenewLease(self, request: pb.RenewLeaseRequest, context: Context) -> pb.RenewLeaseResponse:
        self._registry.renew(
            request.worker_id, request.lease_epoch, request.running, request.policy_version, read_status(request)
        )
        return pb.RenewLeaseResponse(lease_seconds=self._registry.lease_seconds)

    async def DeregisterWorker(
        self, request: pb.DeregisterWorkerRequest, context: Context
    ) -> pb.DeregisterWorkerResponse:
        self._registry.deregister(request.worker_id, request.lease_epoch)
        return pb.DeregisterWorkerResponse()

    async def StartRun(self, request: pb.StartRunRequest, context: Context) -> pb.StartRunResponse:
        resumed = await self._runs.start(request.run_id, request.config_yaml, request.run_path)
        return pb.StartRunResponse(run_id=request.run_id, resumed=resumed)

    async def PutFile(self, request: pb.PutFileRequest, context: Context) -> pb.PutFileResponse:
        return pb.PutFileResponse(path=await self._runs.put_file(request.run_id, request.run_path, request.piece))

    async def StopRun(self, request: pb.StopRunRequest, context: Context) -> pb.StopRunResponse:
        await self._runs.stop(request.run_id)
        return pb.StopRunResponse()

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:
        status = self._runs.status(request.run_id)
        response = pb.GetStatusResponse(
            workers=worker_snapshots(self._registry),
            buffer_address=self._config.buffer_address,
            trainer_address=self._config.trainer_address,
        )
        if status is not None:
            response.run.CopyFrom(status.snapshot())
        return response

    async def WatchRun(self, request: pb.WatchRunRequest, context: Context) -> AsyncIterator[pb.WatchRunResponse]:
        cursor = Cursor(
            request.after_iteration if request.HasField("after_iteration") else None,
            request.after_evaluation if request.HasField("after_evaluation") else None,
        )
        async with aclosing(self._runs.watch(request.run_id, cursor, request.events)) as responses:
            async for response in responses:
                yield response


def read_status(request: pb.RegisterWorkerRequest | pb.RenewLeaseRequest) -> WorkerStatus:
    """Returns the status that a worker reports; one of an earlier release says only whether it is ready."""
    return request.status or (READY if request.ready else EMPTY)
