"""The gRPC face of the buffer: protobuf in, a call of the domain, protobuf out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc

from perigee.buffer.v1 import buffer_pb2 as pb
from perigee.buffer.v1.buffer_pb2_grpc import BufferServiceServicer
from services.buffer import groups, metrics, requests, runs, trajectories
from services.buffer.config import BufferConfig
from services.buffer.packing import ITEM_BYTES
from services.buffer.responses import write_group, write_piece, write_run
from services.buffer.scripts import ScriptRunner

Context = grpc.aio.ServicerContext[object, object]


class BufferService(BufferServiceServicer):
    """`perigee.buffer.v1.BufferService` on one Redis."""

    def __init__(self, scripts: ScriptRunner, config: BufferConfig) -> None:
        self._scripts = scripts
        self._config = config

    async def CreateRun(self, request: pb.CreateRunRequest, context: Context) -> pb.CreateRunResponse:
        """Creates the run or confirms it."""
        requests.check_run_id(request.run_id)
        state, created = await runs.create_run(
            self._scripts, request.run_id, request.config_digest, request.policy_version, request.coordinator_state
        )
        return pb.CreateRunResponse(run=write_run(state), created=created)

    async def GetRun(self, request: pb.GetRunRequest, context: Context) -> pb.GetRunResponse:
        """Reads the run's state."""
        requests.check_run_id(request.run_id)
        return pb.GetRunResponse(run=write_run(await runs.get_run(self._scripts, request.run_id)))

    async def CreateGroups(self, request: pb.CreateGroupsRequest, context: Context) -> pb.CreateGroupsResponse:
        """Creates groups with their trajectories."""
        requests.check_run_id(request.run_id)
        new = requests.read_groups(request.groups, self._config.limits)
        return pb.CreateGroupsResponse(created=await groups.create_groups(self._scripts, request.run_id, new))

    async def ListGroups(self, request: pb.ListGroupsRequest, context: Context) -> AsyncIterator[pb.ListGroupsResponse]:
        """Streams the groups not consumed."""
        requests.check_run_id(request.run_id)
        pages = groups.list_groups(self._scripts, request.run_id, self._config.page_trajectories)
        async with aclosing(pages):
            async for page in pages:
                yield pb.ListGroupsResponse(groups=[write_group(group) for group in page])

    async def LeaseTrajectories(
        self, request: pb.LeaseTrajectoriesRequest, context: Context
    ) -> pb.LeaseTrajectoriesResponse:
        """Leases trajectories to a worker."""
        requests.check_run_id(request.run_id)
        ids = requests.read_ids(
            "trajectory_ids", request.trajectory_ids, self._config.limits, worker_id=request.worker_id
        )
        leases = await trajectories.lease_trajectories(self._scripts, request.run_id, request.worker_id, ids)
        metrics.LEASES.inc(len(leases))
        return pb.LeaseTrajectoriesResponse(
            leases=[pb.Lease(trajectory_id=item.trajectory_id, epoch=item.epoch, tokens=item.tokens) for item in leases]
        )

    async def AppendChunks(self, request: pb.AppendChunksRequest, context: Context) -> pb.AppendChunksResponse:
        """Appends chunks."""
        requests.check_run_id(request.run_id)
        chunks = requests.read_chunks(request.chunks, self._config.limits)
        outcomes = await trajectories.append_chunks(self._scripts, request.run_id, chunks)
        metrics.count_chunks(chunks, outcomes)
        return pb.AppendChunksResponse(outcomes=[pb.AppendOutcome.ValueType(outcome) for outcome in outcomes])

    async def ReadTrajectories(
        self, request: pb.ReadTrajectoriesRequest, context: Context
    ) -> AsyncIterator[pb.ReadTrajectoriesResponse]:
        """Streams trajectories with their tokens."""
        requests.check_run_id(request.run_id)
        ids = requests.read_ids("trajectory_ids", request.trajectory_ids, self._config.limits)
        pieces = trajectories.read_trajectories(
            self._scripts,
            request.run_id,
            ids,
            with_logprobs=request.with_logprobs,
            piece_tokens=self._config.read_piece_tokens,
        )
        async with aclosing(pieces):
            async for piece in pieces:
                metrics.TOKENS_READ.inc(len(piece.tokens) // ITEM_BYTES)
                yield write_piece(piece)

    async def RecordVerdicts(self, request: pb.RecordVerdictsRequest, context: Context) -> pb.RecordVerdictsResponse:
        """Records verdicts."""
        requests.check_run_id(request.run_id)
        verdicts = requests.read_verdicts(request.verdicts, self._config.limits)
        recorded = await groups.record_verdicts(self._scripts, request.run_id, verdicts)
        metrics.VERDICTS.inc(recorded)
        return pb.RecordVerdictsResponse(recorded=recorded)

    async def ListPromptStatistics(
        self, request: pb.ListPromptStatisticsRequest, context: Context
    ) -> pb.ListPromptStatisticsResponse:
        """Reads a page of statistics."""
        requests.check_run_id(request.run_id)
        page, next_page_token = await runs.list_statistics(
            self._scripts, request.run_id, request.page_token, self._config.page_prompts
        )
        prompts = [
            pb.PromptStatistics(prompt_id=item.prompt_id, trajectories=item.trajectories, correct=item.correct)
            for item in page
        ]
        return pb.ListPromptStatisticsResponse(prompts=prompts, next_page_token=next_page_token)

    async def CommitIteration(self, request: pb.CommitIterationRequest, context: Context) -> pb.CommitIterationResponse:
        """Closes an iteration."""
        requests.check_run_id(request.run_id)
        commit = requests.read_commit(request, self._config.limits)
        state, duplicate = await runs.commit_iteration(self._scripts, request.run_id, commit)
        if not duplicate:
            metrics.COMMITS.inc()
        return pb.CommitIterationResponse(run=write_run(state), duplicate=duplicate)
