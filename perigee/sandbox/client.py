"""Typed client of the code sandbox."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from perigee.rpc import ChannelOptions, ServiceClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from perigee.sandbox.v1.sandbox_pb2_grpc import SandboxServiceStub

if TYPE_CHECKING:
    from perigee.sandbox.v1.sandbox_pb2_grpc import SandboxServiceAsyncStub


# What a request leaves unset: the service's defaults, of a checker's compiler, too. A runtime's may be longer.
_WALL_MS, _COMPILE_MS = 10_000, 60_000
_QUEUE_S = 60.0
_INTERACTOR_MS = 5_000


def wait_s(request: pb.ExecuteRequest | pb.JudgeRequest) -> float:
    """Returns how long a call may take by the limits of its request: the queue, the compilers, the runs."""
    wall_ms = request.limits.wall_ms or _WALL_MS
    compile_ms = request.compile_limits.wall_ms or _COMPILE_MS
    if isinstance(request, pb.ExecuteRequest):
        job_ms: float = compile_ms + wall_ms
    else:
        checker_ms = request.checker.program.limits.wall_ms or _WALL_MS if request.checker.HasField("program") else 0
        extra_ms = max(
            (wall_ms * (extra.factor or 1) + extra.added_ms for extra in request.extra_time.values()), default=0
        )
        longest_ms = max(wall_ms, extra_ms, request.interactor.limits.wall_ms)
        run_ms = longest_ms + _INTERACTOR_MS + 2 * checker_ms
        job_ms = 2 * compile_ms + len(request.tests) * (request.passes or 1) * run_ms
    return (1 + request.retry_starved) * (_QUEUE_S + job_ms / 1000)


class SandboxClient(ServiceClient):
    """Client of the code sandbox (`perigee.sandbox.v1.SandboxService`)."""

    service_name = "perigee.sandbox.v1.SandboxService"
    idempotent = ("ListRuntimes", "Judge", "Execute", "JudgePatch", "Assess", "CloseSession")
    message_bytes = 256 << 20

    def __init__(self, target: str, options: ChannelOptions = ChannelOptions()) -> None:
        super().__init__(target, options)
        self._stub: SandboxServiceAsyncStub = SandboxServiceStub(self.channel)

    async def run(
        self, source: str, language: str = "python", *, stdin: str = "", timeout_s: float = 60.0
    ) -> pb.ExecuteResponse:
        """Runs a program given as text; `execute` offers the rest."""
        request = pb.ExecuteRequest(language=language, source=source.encode(), stdin=stdin.encode())
        return await self.execute(request, timeout_s=timeout_s)

    async def execute(self, request: pb.ExecuteRequest, *, timeout_s: float | None = None) -> pb.ExecuteResponse:
        """Compiles a program if its language needs it, and runs it once; the deadline follows the limits unless set."""
        return await self._unary(self._stub.Execute, request, timeout_s or wait_s(request))

    def execute_stream(
        self, request: pb.ExecuteRequest, *, timeout_s: float = 180.0
    ) -> AsyncIterator[pb.ExecuteStreamResponse]:
        """Runs a program and streams its output; the last event is `finished`."""
        return self._stream(self._stub.ExecuteStream, pb.ExecuteStreamRequest(execute=request), timeout_s)

    def execute_batch(
        self, request: pb.ExecuteBatchRequest, *, timeout_s: float = 3600.0
    ) -> AsyncIterator[pb.ExecuteBatchResponse]:
        """Runs many programs; each response comes as soon as its program has ended."""
        return self._stream(self._stub.ExecuteBatch, request, timeout_s)

    async def judge(self, request: pb.JudgeRequest, *, timeout_s: float | None = None) -> pb.JudgeResponse:
        """Runs a submission against its tests; expected outputs never enter the isolated program's reach.

        The deadline follows the request's limits unless it is set.
        """
        return await self._unary(self._stub.Judge, request, timeout_s or wait_s(request))

    def judge_batch(
        self, request: pb.JudgeBatchRequest, *, timeout_s: float = 3600.0
    ) -> AsyncIterator[pb.JudgeBatchResponse]:
        """Judges many submissions; each response comes as soon as its submission is judged."""
        return self._stream(self._stub.JudgeBatch, request, timeout_s)

    async def judge_patch(self, request: pb.JudgePatchRequest, *, timeout_s: float = 600.0) -> pb.JudgePatchResponse:
        """Applies a patch to a repository and judges it by the tests that must pass."""
        return await self._unary(self._stub.JudgePatch, request, timeout_s)

    async def assess(self, request: pb.AssessRequest, *, timeout_s: float = 600.0) -> pb.AssessResponse:
        """Takes a repository through stages, each with a score."""
        return await self._unary(self._stub.Assess, request, timeout_s)

    @asynccontextmanager
    async def session(
        self, language: str = "python", *, limits: pb.Limits | None = None, environment: Mapping[str, str] | None = None
    ) -> AsyncIterator[Session]:
        """Opens an interpreter that keeps its variables from cell to cell, and closes it when the block ends."""
        request = pb.CreateSessionRequest(language=language, limits=limits, env=environment)
        session = Session(self, (await self.create_session(request)).session_id)
        try:
            yield session
        finally:
            await self.close_session(pb.CloseSessionRequest(session_id=session.id))

    async def create_session(
        self, request: pb.CreateSessionRequest, *, timeout_s: float = 60.0
    ) -> pb.CreateSessionResponse:
        """Starts an interpreter that keeps its variables from cell to cell."""
        return await self._unary(self._stub.CreateSession, request, timeout_s)

    async def run_cell(self, request: pb.RunCellRequest, *, timeout_s: float = 180.0) -> pb.RunCellResponse:
        """Runs one cell; the cells of a session run one after another."""
        return await self._unary(self._stub.RunCell, request, timeout_s)

    async def interrupt_session(
        self, request: pb.InterruptSessionRequest, *, timeout_s: float = 20.0
    ) -> pb.InterruptSessionResponse:
        """Interrupts the running cell of a session."""
        return await self._unary(self._stub.InterruptSession, request, timeout_s)

    async def restart_session(
        self, request: pb.RestartSessionRequest, *, timeout_s: float = 180.0
    ) -> pb.RestartSessionResponse:
        """Starts an interpreter of a session anew; files stay."""
        return await self._unary(self._stub.RestartSession, request, timeout_s)

    async def close_session(
        self, request: pb.CloseSessionRequest, *, timeout_s: float = 20.0
    ) -> pb.CloseSessionResponse:
        """Ends a session; one that has ended already is no error."""
        return await self._unary(self._stub.CloseSession, request, timeout_s)

    async def list_runtimes(
        self, request: pb.ListRuntimesRequest, *, timeout_s: float = 60.0
    ) -> pb.ListRuntimesResponse:
        """Lists the languages with their versions and limits, and what is missing."""
        return await self._unary(self._stub.ListRuntimes, request, timeout_s)


class Session:
    """Open session."""

    def __init__(self, client: SandboxClient, session_id: str) -> None:
        self.id = session_id
        self._client = client

    async def run(self, code: str, *, wall_ms: int | None = None, context: str = "") -> pb.RunCellResponse:
        """Runs one cell."""
        request = pb.RunCellRequest(session_id=self.id, code=code.encode(), wall_ms=wall_ms, context=context)
        return await self._client.run_cell(request)

    async def interrupt(self) -> None:
        """Interrupts the running cell."""
        await self._client.interrupt_session(pb.InterruptSessionRequest(session_id=self.id))

    async def restart(self, context: str = "") -> None:
        """Starts an interpreter anew: its variables are forgotten, files stay."""
        await self._client.restart_session(pb.RestartSessionRequest(session_id=self.id, context=context))
