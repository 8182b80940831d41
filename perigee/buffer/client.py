"""Typed client of the replay buffer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from perigee.buffer.v1 import buffer_pb2 as pb
from perigee.buffer.v1.buffer_pb2_grpc import BufferServiceStub
from perigee.rpc import ChannelOptions, ServiceClient

if TYPE_CHECKING:
    from perigee.buffer.v1.buffer_pb2_grpc import BufferServiceAsyncStub


class BufferClient(ServiceClient):
    """Client of the replay buffer (`perigee.buffer.v1.BufferService`)."""

    service_name = "perigee.buffer.v1.BufferService"
    idempotent = (
        "CreateRun",
        "GetRun",
        "CreateGroups",
        "LeaseTrajectories",
        "AppendChunks",
        "RecordVerdicts",
        "ListPromptStatistics",
        "CommitIteration",
    )

    def __init__(self, target: str, options: ChannelOptions = ChannelOptions()) -> None:
        super().__init__(target, options)
        self._stub: BufferServiceAsyncStub = BufferServiceStub(self.channel)

    async def create_run(self, request: pb.CreateRunRequest, *, timeout_s: float = 20.0) -> pb.CreateRunResponse:
        """Creates the run, or confirms that it exists with the same configuration digest."""
        return await self._unary(self._stub.CreateRun, request, timeout_s)

    async def get_run(self, request: pb.GetRunRequest, *, timeout_s: float = 20.0) -> pb.GetRunResponse:
        """Reads the run state."""
        return await self._unary(self._stub.GetRun, request, timeout_s)

    async def create_groups(
        self, request: pb.CreateGroupsRequest, *, timeout_s: float = 20.0
    ) -> pb.CreateGroupsResponse:
        """Creates groups with their k empty trajectories; a group that exists is left as it is."""
        return await self._unary(self._stub.CreateGroups, request, timeout_s)

    def list_groups(
        self, request: pb.ListGroupsRequest, *, timeout_s: float = 60.0
    ) -> AsyncIterator[pb.ListGroupsResponse]:
        """Lists the groups not consumed yet, oldest first, with the state of every trajectory but no tokens."""
        return self._stream(self._stub.ListGroups, request, timeout_s)

    async def lease_trajectories(
        self, request: pb.LeaseTrajectoriesRequest, *, timeout_s: float = 20.0
    ) -> pb.LeaseTrajectoriesResponse:
        """Gives trajectories to a worker: each lease raises the trajectory's epoch, which fences older ones."""
        return await self._unary(self._stub.LeaseTrajectories, request, timeout_s)

    async def append_chunks(
        self, request: pb.AppendChunksRequest, *, timeout_s: float = 20.0
    ) -> pb.AppendChunksResponse:
        """Appends chunks. The same chunk twice is one chunk; a gap, or the epoch of an older lease, is refused."""
        return await self._unary(self._stub.AppendChunks, request, timeout_s)

    def read_trajectories(
        self, request: pb.ReadTrajectoriesRequest, *, timeout_s: float = 60.0
    ) -> AsyncIterator[pb.ReadTrajectoriesResponse]:
        """Streams whole trajectories as bounded chunks, in the order asked for."""
        return self._stream(self._stub.ReadTrajectories, request, timeout_s)

    async def record_verdicts(
        self, request: pb.RecordVerdictsRequest, *, timeout_s: float = 20.0
    ) -> pb.RecordVerdictsResponse:
        """Records the verdict of finished trajectories; the first one recorded stands."""
        return await self._unary(self._stub.RecordVerdicts, request, timeout_s)

    async def list_prompt_statistics(
        self, request: pb.ListPromptStatisticsRequest, *, timeout_s: float = 20.0
    ) -> pb.ListPromptStatisticsResponse:
        """Reads the statistics of prompts, page by page."""
        return await self._unary(self._stub.ListPromptStatistics, request, timeout_s)

    async def commit_iteration(
        self, request: pb.CommitIterationRequest, *, timeout_s: float = 20.0
    ) -> pb.CommitIterationResponse:
        """Closes an iteration in one atomic change: groups consumed, statistics, policy version, run state."""
        return await self._unary(self._stub.CommitIteration, request, timeout_s)
