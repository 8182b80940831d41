"""Client of the code sandbox for code that is not asynchronous."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self, cast

import grpc

from perigee.errors import UnavailableError, from_rpc_error
from perigee.reload import Reloaded
from perigee.rpc import ChannelOptions, may_be_tls, open_blocking_channel
from perigee.sandbox.client import SandboxClient, wait_s
from perigee.sandbox.v1 import sandbox_pb2 as pb
from perigee.sandbox.v1.sandbox_pb2_grpc import SandboxServiceStub


class BlockingSandbox:
    """Runs and judges programs, and waits; any number of threads may share one.

    Its methods, deadlines and errors are those of `SandboxClient`; it reads its certificates once.
    """

    def __init__(self, target: str, options: ChannelOptions = ChannelOptions()) -> None:
        self._channel = open_blocking_channel(target, options, SandboxClient)
        self._stub = SandboxServiceStub(self._channel)
        self._target = target
        self._options = options
        self._metadata = Reloaded((options.token_file,), options.read_metadata)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the channel; calls in flight are cancelled."""
        self._channel.close()

    def run(
        self, source: str, language: str = "python", *, stdin: str = "", timeout_s: float = 60.0
    ) -> pb.ExecuteResponse:
        """Runs a program given as text; `execute` offers the rest."""
        request = pb.ExecuteRequest(language=language, source=source.encode(), stdin=stdin.encode())
        return self.execute(request, timeout_s=timeout_s)

    def execute(self, request: pb.ExecuteRequest, *, timeout_s: float | None = None) -> pb.ExecuteResponse:
        """Compiles a program if its language needs it, and runs it once."""
        with self._raising():
            return self._stub.Execute(request, timeout=timeout_s or wait_s(request), metadata=self._metadata.value)

    def judge(self, request: pb.JudgeRequest, *, timeout_s: float | None = None) -> pb.JudgeResponse:
        """Runs a submission against its tests."""
        with self._raising():
            return self._stub.Judge(request, timeout=timeout_s or wait_s(request), metadata=self._metadata.value)

    def judge_batch(
        self, request: pb.JudgeBatchRequest, *, timeout_s: float = 3600.0
    ) -> Iterator[pb.JudgeBatchResponse]:
        """Judges many submissions; each response comes as soon as its submission is judged."""
        call = self._stub.JudgeBatch(request, timeout=timeout_s, metadata=self._metadata.value)
        try:
            with self._raising():
                yield from call
        finally:
            call.cancel()

    def judge_patch(self, request: pb.JudgePatchRequest, *, timeout_s: float = 600.0) -> pb.JudgePatchResponse:
        """Applies a patch to a repository and judges it by the tests that must pass."""
        with self._raising():
            return self._stub.JudgePatch(request, timeout=timeout_s, metadata=self._metadata.value)

    def assess(self, request: pb.AssessRequest, *, timeout_s: float = 600.0) -> pb.AssessResponse:
        """Takes a repository through stages, each with a score."""
        with self._raising():
            return self._stub.Assess(request, timeout=timeout_s, metadata=self._metadata.value)

    def list_runtimes(self, *, timeout_s: float = 60.0) -> pb.ListRuntimesResponse:
        """Lists the languages with their versions and limits, and what is missing."""
        with self._raising():
            return self._stub.ListRuntimes(pb.ListRuntimesRequest(), timeout=timeout_s, metadata=self._metadata.value)

    @contextmanager
    def _raising(self) -> Iterator[None]:
        """Raises the class of `perigee.errors` for what a call raises."""
        try:
            yield
        except grpc.RpcError as error:
            shown = from_rpc_error(cast(grpc.Call, error), f"SandboxService at {self._target}")
            if may_be_tls(shown) and (fault := self._options.find_fault(self._target)):
                shown = UnavailableError(fault)
            raise shown from error
