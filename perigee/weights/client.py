"""Typed clients of the weight receiver of a rollout worker, and of those who lend weights."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from perigee.rpc import ChannelOptions, ServiceClient
from perigee.weights.v1 import weights_pb2 as pb
from perigee.weights.v1.weights_pb2_grpc import WeightReceiverServiceStub, WeightSourceServiceStub

if TYPE_CHECKING:
    from perigee.weights.v1.weights_pb2_grpc import WeightReceiverServiceAsyncStub, WeightSourceServiceAsyncStub


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

    async def pull(self, request: pb.PullRequest, *, timeout_s: float = 600.0) -> pb.PullResponse:
        """Has the worker pull an image from sources, verify and commit it."""
        return await self._unary(self._stub.Pull, request, timeout_s)


class WeightSourceClient(ServiceClient):
    """Client of a process that lends weights (`perigee.weights.v1.WeightSourceService`)."""

    service_name = "perigee.weights.v1.WeightSourceService"

    def __init__(self, target: str, options: ChannelOptions = ChannelOptions()) -> None:
        super().__init__(target, options)
        self._stub: WeightSourceServiceAsyncStub = WeightSourceServiceStub(self.channel)

    def lend(self, request: pb.LendRequest, *, timeout_s: float = 300.0) -> AsyncIterator[pb.LendResponse]:
        """Tells which pieces of an image can be read, and keeps them in place until the stream ends."""
        return self._stream(self._stub.Lend, request, timeout_s)
