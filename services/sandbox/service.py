"""SandboxService: protobuf in, domain call, protobuf out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from perigee.sandbox.v1 import sandbox_pb2 as pb
from perigee.sandbox.v1.sandbox_pb2_grpc import SandboxServiceServicer
from services.sandbox.batches import run_batch
from services.sandbox.execute import Piece, execute, execute_stream
from services.sandbox.idempotency import Once
from services.sandbox.judge import judge
from services.sandbox.judge_requests import read_submission
from services.sandbox.pool import Pool
from services.sandbox.requests import read_job
from services.sandbox.responses import (
    cell_response,
    execute_response,
    item_error,
    judge_response,
    limits_message,
    stream_response,
)
from services.sandbox.session_requests import check_batch, read_cell, read_session
from services.sandbox.sessions import Sessions
from services.sandbox.versions import Versions

FULL_NAME = "perigee.sandbox.v1.SandboxService"

Context = grpc.aio.ServicerContext[Any, Any]
Response = pb.ExecuteResponse | pb.JudgeResponse


class SandboxService(SandboxServiceServicer):
    """Serves a pool of slots."""

    def __init__(self, pool: Pool, sessions: Sessions, versions: Versions, once: Once[Response]) -> None:
        self._pool = pool
        self._sessions = sessions
        self._versions = versions
        self._once = once

    async def Execute(self, request: pb.ExecuteRequest, context: Context) -> pb.ExecuteResponse:
        """Runs one program once."""
        return await self._execute(request, context.time_remaining())

    async def _execute(self, request: pb.ExecuteRequest, remaining_s: float | None) -> pb.ExecuteResponse:
        job = read_job(request, self._pool.config, self._pool.catalog)

        async def work() -> Response:
            return execute_response(await execute(self._pool, job, remaining_s))

        response = await self._run_once(request, work)
        assert isinstance(response, pb.ExecuteResponse)
        return response

    async def ExecuteStream(
        self, request: pb.ExecuteStreamRequest, context: Context
    ) -> AsyncIterator[pb.ExecuteStreamResponse]:
        """Runs one program once and tells its output as it is written."""
        job = read_job(request.execute, self._pool.config, self._pool.catalog)
        async with aclosing(execute_stream(self._pool, job, context.time_remaining())) as events:
            async for event in events:
                if isinstance(event, Piece):
                    yield stream_response(event)
                else:
                    yield pb.ExecuteStreamResponse(finished=execute_response(event))

    async def ExecuteBatch(
        self, request: pb.ExecuteBatchRequest, context: Context
    ) -> AsyncIterator[pb.ExecuteBatchResponse]:
        """Runs many programs."""
        check_batch(request.requests, self._pool.config)
        works = [lambda item=item: self._execute(item, None) for item in request.requests]
        async with aclosing(run_batch(works)) as outcomes:
            async for index, response, error in outcomes:
                yield pb.ExecuteBatchResponse(
                    index=index, response=response, error=None if error is None else item_error(error)
                )

    async def Judge(self, request: pb.JudgeRequest, context: Context) -> pb.JudgeResponse:
        """Runs a submission against its tests."""
        return await self._judge(request, context.time_remaining())

    async def _judge(self, request: pb.JudgeRequest, remaining_s: float | None) -> pb.JudgeResponse:
        submission = read_submission(request, self._pool.config, self._pool.catalog)

        async def work() -> Response:
            return judge_response(await judge(self._pool, submission, remaining_s))

        response = await self._run_once(request, work)
        assert isinstance(response, pb.JudgeResponse)
        return response

    async def JudgeBatch(self, request: pb.JudgeBatchRequest, context: Context) -> AsyncIterator[pb.JudgeBatchResponse]:
        """Judges many submissions."""
        check_batch(request.requests, self._pool.config)
        works = [lambda item=item: self._judge(item, None) for item in request.requests]
        async with aclosing(run_batch(works)) as outcomes:
            async for index, response, error in outcomes:
                yield pb.JudgeBatchResponse(
                    index=index, response=response, error=None if error is None else item_error(error)
                )

    async def CreateSession(self, request: pb.CreateSessionRequest, context: Context) -> pb.CreateSessionResponse:
        """Starts a stateful interpreter."""
        program, idle_seconds = read_session(request, self._pool.config, self._pool.catalog)
        session = await self._sessions.create(program, idle_seconds)
        return pb.CreateSessionResponse(session_id=session.id, idle_seconds=idle_seconds)

    async def RunCell(self, request: pb.RunCellRequest, context: Context) -> pb.RunCellResponse:
        """Runs one cell of a session."""
        cell = read_cell(request, self._pool.config, self._pool.catalog)
        return cell_response(await self._sessions.run(request.session_id, cell))

    async def CloseSession(self, request: pb.CloseSessionRequest, context: Context) -> pb.CloseSessionResponse:
        """Ends a session."""
        await self._sessions.end(request.session_id)
        return pb.CloseSessionResponse()

    async def ListRuntimes(self, request: pb.ListRuntimesRequest, context: Context) -> pb.ListRuntimesResponse:
        """Tells the languages with their versions, limits and isolation, and what is missing."""
        described = await self._versions.describe()
        runtimes = [
            pb.Runtime(
                language=runtime.name,
                version=version,
                default_limits=limits_message(runtime.limits),
                maximum_limits=limits_message(self._pool.config.maximum_limits),
                isolation=isolation,
                title=runtime.config.title,
                aliases=runtime.config.aliases,
                compiled=bool(runtime.config.compile),
                sessions=runtime.python is not None,
                functions=runtime.python is not None,
            )
            for runtime, version, isolation in described.runtimes
        ]
        missing = [pb.MissingRuntime(language=entry.name, reason=entry.reason) for entry in described.missing]
        return pb.ListRuntimesResponse(runtimes=runtimes, missing=missing)

    async def _run_once(self, request: pb.ExecuteRequest | pb.JudgeRequest, work: Any) -> Response:
        if not request.idempotency_key:
            return await work()  # type: ignore[no-any-return]
        key = f"{request.DESCRIPTOR.name}:{request.idempotency_key}"
        return await self._once.get(key, request.SerializeToString(deterministic=True), work)
