"""SandboxService: protobuf in, domain call, protobuf out; and its RPCs over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import grpc

from perigee.errors import InvalidArgumentError, PerigeeError, ResourceExhaustedError, to_status
from perigee.sandbox.v1 import sandbox_pb2 as pb
from perigee.sandbox.v1.sandbox_pb2_grpc import SandboxServiceServicer
from services.kit.http import CompatRouter, HttpRoute
from services.kit.single_flight import SingleFlightCache
from services.sandbox.api.e2b import e2b_apis
from services.sandbox.api.piston import piston_api
from services.sandbox.api.repositories import read_assessment, read_patch_job
from services.sandbox.api.requests import check_batch, check_cell, read_job, read_session, read_submission
from services.sandbox.api.run_jupyter import run_jupyter_api
from services.sandbox.api.sandbox_fusion import sandbox_fusion_api
from services.sandbox.judge.judge import judge
from services.sandbox.judge.repositories import Repositories
from services.sandbox.judge.session_tests import run_tests_in_session
from services.sandbox.runtime.execute import execute, execute_stream
from services.sandbox.runtime.pool import Pool
from services.sandbox.runtime.sessions import OnOutput, Sessions
from services.sandbox.runtime.versions import Versions

OPENAPI_FILE = Path(__file__).with_name("openapi.json")
ROUTES = (
    HttpRoute("POST", "/v1/execute", "Execute", pb.ExecuteRequest, pb.ExecuteResponse),
    HttpRoute(
        "POST", "/v1/execute/stream", "ExecuteStream", pb.ExecuteStreamRequest, pb.ExecuteStreamResponse, streaming=True
    ),
    HttpRoute(
        "POST", "/v1/execute/batch", "ExecuteBatch", pb.ExecuteBatchRequest, pb.ExecuteBatchResponse, streaming=True
    ),
    HttpRoute("POST", "/v1/judge", "Judge", pb.JudgeRequest, pb.JudgeResponse),
    HttpRoute("POST", "/v1/judge/batch", "JudgeBatch", pb.JudgeBatchRequest, pb.JudgeBatchResponse, streaming=True),
    HttpRoute("POST", "/v1/sessions", "CreateSession", pb.CreateSessionRequest, pb.CreateSessionResponse),
    HttpRoute("POST", "/v1/sessions/{session_id}/cells", "RunCell", pb.RunCellRequest, pb.RunCellResponse),
    HttpRoute(
        "POST",
        "/v1/sessions/{session_id}/interrupt",
        "InterruptSession",
        pb.InterruptSessionRequest,
        pb.InterruptSessionResponse,
    ),
    HttpRoute(
        "POST",
        "/v1/sessions/{session_id}/restart",
        "RestartSession",
        pb.RestartSessionRequest,
        pb.RestartSessionResponse,
    ),
    HttpRoute("DELETE", "/v1/sessions/{session_id}", "CloseSession", pb.CloseSessionRequest, pb.CloseSessionResponse),
    HttpRoute("POST", "/v1/patches/judge", "JudgePatch", pb.JudgePatchRequest, pb.JudgePatchResponse),
    HttpRoute("POST", "/v1/assess", "Assess", pb.AssessRequest, pb.AssessResponse),
    HttpRoute("GET", "/v1/runtimes", "ListRuntimes", pb.ListRuntimesRequest, pb.ListRuntimesResponse),
)


T = TypeVar("T")
Response = pb.ExecuteResponse | pb.JudgeResponse | pb.JudgePatchResponse | pb.AssessResponse
_AT_ONCE = 32
_PAUSE_S = 0.5


async def run_batch(
    works: Sequence[Callable[[], Awaitable[T]]],
) -> AsyncGenerator[tuple[int, T | None, PerigeeError | None], None]:
    """Runs the items of a batch side by side; yields the index and either result or error of each as it ends.

    An item that the job queue refuses is tried again. Leaving the iteration ends all items.
    """
    capacity = asyncio.Semaphore(_AT_ONCE)
    # holds one entry for each item, and the request bounds the items
    done: asyncio.Queue[tuple[int, T | None, PerigeeError | None]] = asyncio.Queue()

    async def run(index: int, work: Callable[[], Awaitable[T]]) -> None:
        async with capacity:
            while True:
                try:
                    done.put_nowait((index, await work(), None))
                except ResourceExhaustedError as error:
                    await asyncio.sleep(max(_PAUSE_S, error.retry_after_s or 0.0))
                    continue
                except PerigeeError as error:
                    done.put_nowait((index, None, error))
                return

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(run(index, work)) for index, work in enumerate(works)]
        try:
            for _ in works:
                yield await done.get()
        finally:
            for task in tasks:
                task.cancel()


def is_final(response: Response) -> bool:
    """Returns whether a response is about the program, and no failure of the sandbox, which may be temporary."""
    if isinstance(response, pb.ExecuteResponse):
        return response.status != pb.STATUS_INFRA_ERROR
    if isinstance(response, pb.JudgePatchResponse | pb.AssessResponse):
        return response.verdict != pb.TEST_VERDICT_INFRA_ERROR
    return all(result.verdict != pb.TEST_VERDICT_INFRA_ERROR for result in response.results)


def item_error(error: PerigeeError) -> pb.ItemError:
    """Returns the error of one item of a batch."""
    item = pb.ItemError(code=to_status(error).code, message=error.message)
    if isinstance(error, InvalidArgumentError):
        item.field_violations.update({violation.field: violation.description for violation in error.violations})
    if error.retry_after_s is not None:
        item.retry_after_ms = round(error.retry_after_s * 1000)
    return item


FULL_NAME = "perigee.sandbox.v1.SandboxService"

Context = grpc.aio.ServicerContext[Any, Any]


class SandboxService(SandboxServiceServicer):
    """Serves a pool of slots."""

    def __init__(
        self, pool: Pool, sessions: Sessions, versions: Versions, results: SingleFlightCache[str, Response]
    ) -> None:
        self._pool = pool
        self.sessions = sessions
        self._versions = versions
        self._results = results
        self._repositories = Repositories(pool)

    async def Execute(self, request: pb.ExecuteRequest, context: Context) -> pb.ExecuteResponse:
        """Runs one program once."""
        return await self._execute(request, context.time_remaining())

    async def _execute(self, request: pb.ExecuteRequest, remaining_s: float | None) -> pb.ExecuteResponse:
        job = read_job(request, self._pool.config, self._pool.catalog)
        response = await self._run_once(request, lambda: execute(self._pool, job, remaining_s))
        assert isinstance(response, pb.ExecuteResponse)
        return response

    async def ExecuteStream(
        self, request: pb.ExecuteStreamRequest, context: Context
    ) -> AsyncIterator[pb.ExecuteStreamResponse]:
        """Runs one program once and streams its output."""
        job = read_job(request.execute, self._pool.config, self._pool.catalog)
        async with aclosing(execute_stream(self._pool, job, context.time_remaining())) as events:
            async for event in events:
                yield event

    async def ExecuteBatch(
        self, request: pb.ExecuteBatchRequest, context: Context
    ) -> AsyncIterator[pb.ExecuteBatchResponse]:
        """Runs many programs."""
        check_batch(request.requests, self._pool.config)
        works = [lambda item=item: self._execute(item, None) for item in request.requests]
        async with aclosing(run_batch(works)) as results:
            async for index, response, error in results:
                yield pb.ExecuteBatchResponse(
                    index=index, response=response, error=None if error is None else item_error(error)
                )

    async def Judge(self, request: pb.JudgeRequest, context: Context) -> pb.JudgeResponse:
        """Runs a submission against its tests."""
        return await self._judge(request, context.time_remaining())

    async def _judge(self, request: pb.JudgeRequest, remaining_s: float | None) -> pb.JudgeResponse:
        submission = read_submission(request, self._pool.config, self._pool.catalog)
        response = await self._run_once(request, lambda: judge(self._pool, submission, remaining_s))
        assert isinstance(response, pb.JudgeResponse)
        return response

    async def JudgeBatch(self, request: pb.JudgeBatchRequest, context: Context) -> AsyncIterator[pb.JudgeBatchResponse]:
        """Judges many submissions."""
        check_batch(request.requests, self._pool.config)
        works = [lambda item=item: self._judge(item, None) for item in request.requests]
        async with aclosing(run_batch(works)) as results:
            async for index, response, error in results:
                yield pb.JudgeBatchResponse(
                    index=index, response=response, error=None if error is None else item_error(error)
                )

    async def JudgePatch(self, request: pb.JudgePatchRequest, context: Context) -> pb.JudgePatchResponse:
        """Judges a patch by a repository's tests."""
        job = read_patch_job(request, self._pool.config, self._pool.catalog)
        response = await self._run_once(request, lambda: self._repositories.judge_patch(job, context.time_remaining()))
        assert isinstance(response, pb.JudgePatchResponse)
        return response

    async def Assess(self, request: pb.AssessRequest, context: Context) -> pb.AssessResponse:
        """Takes a repository through stages."""
        job = read_assessment(request, self._pool.config, self._pool.catalog)
        response = await self._run_once(request, lambda: self._repositories.assess(job, context.time_remaining()))
        assert isinstance(response, pb.AssessResponse)
        return response

    async def CreateSession(self, request: pb.CreateSessionRequest, context: Context) -> pb.CreateSessionResponse:
        """Starts a stateful interpreter."""
        program, idle_seconds = read_session(request, self._pool.config, self._pool.catalog)
        session = await self.sessions.create(program, idle_seconds)
        return pb.CreateSessionResponse(session_id=session.id, idle_seconds=idle_seconds)

    async def RunCell(
        self, request: pb.RunCellRequest, context: Context, on_output: OnOutput | None = None
    ) -> pb.RunCellResponse:
        """Runs one cell of a session."""
        check_cell(request, self._pool.config, self._pool.catalog)
        if request.HasField("tests"):
            return await run_tests_in_session(self.sessions, request)
        return await self.sessions.run(request, on_output)

    async def InterruptSession(
        self, request: pb.InterruptSessionRequest, context: Context
    ) -> pb.InterruptSessionResponse:
        """Interrupts the running cell of a session."""
        await self.sessions.find(request.session_id).interrupt()
        return pb.InterruptSessionResponse()

    async def RestartSession(self, request: pb.RestartSessionRequest, context: Context) -> pb.RestartSessionResponse:
        """Starts an interpreter of a session anew."""
        await self.sessions.find(request.session_id).restart(request.context)
        return pb.RestartSessionResponse()

    async def CloseSession(self, request: pb.CloseSessionRequest, context: Context) -> pb.CloseSessionResponse:
        """Ends a session."""
        await self.sessions.end(request.session_id)
        return pb.CloseSessionResponse()

    async def ListRuntimes(self, request: pb.ListRuntimesRequest, context: Context) -> pb.ListRuntimesResponse:
        """Lists the languages with their versions, limits and isolation, and those that are missing."""
        return await self._versions.describe()

    async def _run_once(
        self,
        request: pb.ExecuteRequest | pb.JudgeRequest | pb.JudgePatchRequest | pb.AssessRequest,
        work: Callable[[], Awaitable[Response]],
    ) -> Response:
        if not request.idempotency_key:
            return await work()
        key = f"{request.DESCRIPTOR.name}:{request.idempotency_key}"
        response, _ = await self._results.get(key, work, request.SerializeToString(deterministic=True))
        return response


def compat_routers(servicer: Any) -> tuple[CompatRouter, ...]:
    """Returns the interfaces of other sandboxes, whose handlers call the servicer."""
    return sandbox_fusion_api(servicer), run_jupyter_api(servicer), piston_api(servicer), *e2b_apis(servicer)
