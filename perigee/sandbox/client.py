"""Typed client of the code sandbox."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from perigee.rpc import ChannelOptions, ServiceClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from perigee.sandbox.v1.sandbox_pb2_grpc import SandboxServiceStub

if TYPE_CHECKING:
    from perigee.sandbox.v1.sandbox_pb2_grpc import SandboxServiceAsyncStub


class SandboxClient(ServiceClient):
    """Client of the code sandbox (`perigee.sandbox.v1.SandboxService`)."""

    service_name = "perigee.sandbox.v1.SandboxService"
    idempotent = ("ListRuntimes", "Judge", "Execute")

    def __init__(self, target: str, options: ChannelOptions = ChannelOptions()) -> None:
        super().__init__(target, options)
        self._stub: SandboxServiceAsyncStub = SandboxServiceStub(self.channel)

    async def execute(self, request: pb.ExecuteRequest, *, timeout_s: float = 60.0) -> pb.ExecuteResponse:
        """Runs one program once."""
        return await self._unary(self._stub.Execute, request, timeout_s)

    def execute_stream(
        self, request: pb.ExecuteStreamRequest, *, timeout_s: float = 60.0
    ) -> AsyncIterator[pb.ExecuteStreamResponse]:
        """Runs one program once and yields its output as it is written, then how it ended."""
        return self._stream(self._stub.ExecuteStream, request, timeout_s)

    async def judge(self, request: pb.JudgeRequest, *, timeout_s: float = 60.0) -> pb.JudgeResponse:
        """Runs a submission against its tests; expected outputs never enter the isolated program's reach."""
        return await self._unary(self._stub.Judge, request, timeout_s)

    async def list_runtimes(
        self, request: pb.ListRuntimesRequest, *, timeout_s: float = 20.0
    ) -> pb.ListRuntimesResponse:
        """Lists the languages with their versions and limits."""
        return await self._unary(self._stub.ListRuntimes, request, timeout_s)
