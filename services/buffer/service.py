"""perigee.buffer.v1.BufferService: checks requests, calls the model, and serves as long as Redis does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager

import grpc

from perigee.buffer.packing import count_tokens
from perigee.buffer.v1 import buffer_pb2 as pb
from perigee.buffer.v1.buffer_pb2_grpc import BufferServiceServicer, add_BufferServiceServicer_to_server
from perigee.errors import PerigeeError, UnavailableError
from services.buffer import images, model, requests
from services.buffer.config import BufferConfig
from services.buffer.files import Mover
from services.buffer.local_server import count_restarts, local_server
from services.buffer.nodes import Nodes
from services.buffer.scripts import ScriptRunner
from services.kit.server import App, end_tasks
from services.kit.tasks import start_tasks
from services.kit.telemetry import get_logger

log = get_logger(__name__)

SERVICE_NAME = "perigee.buffer.v1.BufferService"
CHECK_EVERY_S = 1.0
Context = grpc.aio.ServicerContext[object, object]


class BufferService(BufferServiceServicer):
    """Serves the buffer's calls on one Redis."""

    def __init__(self, scripts: ScriptRunner, config: BufferConfig, mover: Mover | None) -> None:
        self._scripts = scripts
        self._config = config
        self._mover = mover

    async def CreateRun(self, request: pb.CreateRunRequest, context: Context) -> pb.CreateRunResponse:
        """Creates the run or confirms it."""
        return await model.create_run(self._scripts, request)

    async def GetRun(self, request: pb.GetRunRequest, context: Context) -> pb.GetRunResponse:
        """Reads the run's state."""
        return pb.GetRunResponse(run=await model.get_run(self._scripts, request.run_id))

    async def CreateGroups(self, request: pb.CreateGroupsRequest, context: Context) -> pb.CreateGroupsResponse:
        """Creates groups with their trajectories."""
        requests.check_groups(request.groups, self._config.limits)
        created = await model.create_groups(self._scripts, request.run_id, request.groups)
        return pb.CreateGroupsResponse(created=created)

    async def PutImages(self, request: pb.PutImagesRequest, context: Context) -> pb.PutImagesResponse:
        """Takes pieces of images."""
        requests.check_pieces(request.pieces, self._config.limits, self._config.images)
        whole = await images.put_images(self._scripts, request, self._config.images)
        return pb.PutImagesResponse(whole=whole)

    async def ReadImages(self, request: pb.ReadImagesRequest, context: Context) -> AsyncIterator[pb.ReadImagesResponse]:
        """Streams images in pieces."""
        requests.check_digests(request.digests, self._config.limits)
        pages = images.read_images(self._scripts, request)
        async with aclosing(pages):
            async for page in pages:
                yield page

    async def ListGroups(self, request: pb.ListGroupsRequest, context: Context) -> AsyncIterator[pb.ListGroupsResponse]:
        """Streams the groups not consumed."""
        pages = model.list_groups(self._scripts, request.run_id, self._config.page_trajectories)
        async with aclosing(pages):
            async for page in pages:
                yield page

    async def LeaseTrajectories(
        self, request: pb.LeaseTrajectoriesRequest, context: Context
    ) -> pb.LeaseTrajectoriesResponse:
        """Leases trajectories to a worker."""
        ids = request.trajectory_ids
        requests.check_ids("trajectory_ids", ids, self._config.limits, worker_id=request.worker_id)
        leases = await model.lease_trajectories(self._scripts, request.run_id, request.worker_id, ids)
        return pb.LeaseTrajectoriesResponse(leases=leases)

    async def AppendChunks(self, request: pb.AppendChunksRequest, context: Context) -> pb.AppendChunksResponse:
        """Appends chunks."""
        requests.check_chunks(request.chunks, self._config.limits)
        moved_tokens = self._config.offload.min_tokens if self._mover is not None else 0
        outcomes = await model.append_chunks(self._scripts, request.run_id, request.chunks, moved_tokens)
        if self._mover is not None and any(
            chunk.end_reason and chunk.offset + count_tokens(chunk.token_ids) >= moved_tokens
            for chunk in request.chunks
        ):
            self._mover.note(request.run_id)
        return pb.AppendChunksResponse(outcomes=outcomes)

    async def ReadTrajectories(
        self, request: pb.ReadTrajectoriesRequest, context: Context
    ) -> AsyncIterator[pb.ReadTrajectoriesResponse]:
        """Streams trajectories with their tokens."""
        requests.check_ids("trajectory_ids", request.trajectory_ids, self._config.limits)
        config = self._config
        pieces = model.read_trajectories(self._scripts, request, config.read_piece_tokens, config.offload)
        async with aclosing(pieces):
            async for piece in pieces:
                yield piece

    async def RecordVerdicts(self, request: pb.RecordVerdictsRequest, context: Context) -> pb.RecordVerdictsResponse:
        """Records verdicts."""
        requests.check_verdicts(request.verdicts, self._config.limits)
        recorded = await model.record_verdicts(self._scripts, request.run_id, request.verdicts)
        return pb.RecordVerdictsResponse(recorded=recorded)

    async def ListPromptStatistics(
        self, request: pb.ListPromptStatisticsRequest, context: Context
    ) -> pb.ListPromptStatisticsResponse:
        """Reads a page of statistics."""
        return await model.list_statistics(self._scripts, request.run_id, request.page_token, self._config.page_prompts)

    async def CommitIteration(self, request: pb.CommitIterationRequest, context: Context) -> pb.CommitIterationResponse:
        """Closes an iteration."""
        requests.check_commit(request, self._config.limits)
        response = await model.commit_iteration(self._scripts, request, self._config.offload.retired_s)
        if self._mover is not None:
            self._mover.note(request.run_id)
        response.store_restarts = count_restarts()
        return response


@asynccontextmanager
async def lifespan(app: App[BufferConfig]) -> AsyncIterator[None]:
    """Serves the buffer, on a Valkey server of its own when no `redis_url` is given; readiness follows Redis.

    Raises FailedPreconditionError when Redis can be reached but does not serve.
    """
    config = app.config
    async with AsyncExitStack() as stack:
        url = config.redis_url.get_secret_value()
        if not url:
            url = await stack.enter_async_context(local_server(config.data_path, config.local_server))
        nodes = Nodes(
            url,
            connections=config.connections,
            # A durable call may wait for the disk before its reply comes.
            timeout_s=config.request_timeout_s + config.durability_timeout_s,
        )
        stack.push_async_callback(nodes.close)
        scripts = ScriptRunner(nodes, durability=config.durability, durability_timeout_s=config.durability_timeout_s)
        try:
            await scripts.check()
        except UnavailableError as error:
            log.warning("redis cannot be reached yet", reason=error.message)
        mover = Mover(scripts, config.offload) if config.offload.location is not None else None
        app.add(SERVICE_NAME, add_BufferServiceServicer_to_server, BufferService(scripts, config, mover))
        tasks = start_tasks(_follow_redis(app, scripts), *([mover.run()] if mover is not None else []))
        try:
            yield
        finally:
            await end_tasks(*tasks)


async def _follow_redis(app: App[BufferConfig], scripts: ScriptRunner) -> None:
    """Sets the readiness of the service to that of Redis, until cancelled."""
    ready = False
    while True:
        reason = ""
        try:
            await scripts.check()
        except PerigeeError as error:
            reason = error.message
            if ready:
                log.error("redis does not serve", reason=reason)
        if ready != (not reason):
            ready = not reason
            log.info("readiness", ready=ready)
        app.set_ready(SERVICE_NAME, ready, reason)
        await asyncio.sleep(CHECK_EVERY_S)
