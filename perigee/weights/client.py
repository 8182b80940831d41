"""Typed client of the weight receiver of a rollout worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from perigee.rpc import ChannelOptions, ServiceClient
from perigee.weights.v1 import weights_pb2 as pb
from perigee.weights.v1.weights_pb2_grpc import WeightReceiverServiceStub

if TYPE_CHECKING:
    from perigee.weights.v1.weights_pb2_grpc import WeightReceiverServiceAsyncStub


class WeightReceiverClient(ServiceClient):
    """Client of the weight receiver of a rollout worker (`perigee.weights.v1.WeightReceiverService`)."""

    service_name = "perigee.weights.v1.WeightReceiverService"
    idempotent = ("Abort",)

    def __init__(self, target: str, options: ChannelOptions = ChannelOptions()) -> None:
        super().__init__(target, options)
        self._stub: WeightReceiverServiceAsyncStub = WeightReceiverServiceStub(self.channel)

    async def prepare(self, request: pb.PrepareRequest, *, timeout_s: float = 60.0) -> pb.PrepareResponse:
        """Reserves a spare buffer for the manifest and returns where to write it."""
        return await self._unary(self._stub.Prepare, request, timeout_s)

    async def commit(self, request: pb.CommitRequest, *, timeout_s: float = 600.0) -> pb.CommitResponse:
        """Verifies the shards and commits the version; DATA_LOSS when a checksum differs."""
        return await self._unary(self._stub.Commit, request, timeout_s)

    async def abort(self, request: pb.AbortRequest, *, timeout_s: float = 20.0) -> pb.AbortResponse:
        """Drops a prepared version."""
        return await self._unary(self._stub.Abort, request, timeout_s)
