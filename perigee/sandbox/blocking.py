"""Client of the code sandbox for code that is not asynchronous."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self, cast

import grpc

from perigee.errors import from_rpc_error
from perigee.rpc import ChannelOptions, channel_arguments
from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from perigee.sandbox.v1.sandbox_pb2_grpc import SandboxServiceStub


class BlockingSandbox:
    """Runs and judges programs, and waits; any number of threads may share one.

    Its methods, deadlines and errors are those of `SandboxClient`.
    """

    def __init__(self, target: str, options: ChannelOptions = ChannelOptions()) -> None:
        self._channel = _open_channel(target, options)
        self._stub = SandboxServiceStub(self._channel)
        self._label = f"SandboxService at {target}"
        self._metadata = (("authorization", f"Bearer {options.token}"),) if options.token else None

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

    def execute(self, request: pb.ExecuteRequest, *, timeout_s: float = 60.0) -> pb.ExecuteResponse:
        """Compiles a program if its language needs it, and runs it once."""
        with self._raising():
            return self._stub.Execute(request, timeout=timeout_s, metadata=self._metadata)

    def judge(self, request: pb.JudgeRequest, *, timeout_s: float = 60.0) -> pb.JudgeResponse:
        """Runs a submission against its tests."""
        with self._raising():
            return self._stub.Judge(request, timeout=timeout_s, metadata=self._metadata)

    def judge_batch(
        self, request: pb.JudgeBatchRequest, *, timeout_s: float = 3600.0
    ) -> Iterator[pb.JudgeBatchResponse]:
        """Judges many submissions; each response comes as soon as its submission is judged."""
        call = self._stub.JudgeBatch(request, timeout=timeout_s, metadata=self._metadata)
        try:
            with self._raising():
                yield from call
        finally:
            call.cancel()

    def list_runtimes(self, *, timeout_s: float = 60.0) -> pb.ListRuntimesResponse:
        """Lists the languages with their versions and limits, and what is missing."""
        with self._raising():
            return self._stub.ListRuntimes(pb.ListRuntimesRequest(), timeout=timeout_s, metadata=self._metadata)

    @contextmanager
    def _raising(self) -> Iterator[None]:
        """Raises the class of `perigee.errors` for what a call raises."""
        try:
            yield
        except grpc.RpcError as error:
            raise from_rpc_error(cast(grpc.Call, error), self._label) from error


def _open_channel(target: str, options: ChannelOptions) -> grpc.Channel:
    """Returns a channel like that of `SandboxClient`."""
    arguments = channel_arguments(SandboxClient.service_name, SandboxClient.idempotent, SandboxClient.message_bytes)
    if options.ca_file is None:
        return grpc.insecure_channel(target, options=arguments)
    files = (options.ca_file, options.key_file, options.cert_file)
    contents = (None if file is None else Path(file).read_bytes() for file in files)
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(*contents), options=arguments)
