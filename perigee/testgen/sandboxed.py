"""Runs of programs in the sandbox, again and again until the sandbox itself did not fail."""

from __future__ import annotations

import asyncio

from perigee.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    PerigeeError,
    ResourceExhaustedError,
    UnavailableError,
)
from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb

# Pauses between the attempts at one run.
PAUSES_S = (0.5, 1.0, 2.0, 4.0)
# A call's deadline beyond the program's own limits: its place in the queue, and its compiler.
QUEUE_S = 120.0
COMPILE_S = 60.0
_PASSING = (UnavailableError, DeadlineExceededError, ResourceExhaustedError)


async def run_program(
    client: SandboxClient, request: pb.ExecuteRequest, what: str, wall_s: float
) -> pb.ExecuteResponse:
    """The program's end, whatever it is; a failure of the sandbox is none and is tried again.

    `what` names the run in errors; `wall_s` is the program's wall-clock limit. Raises InvalidArgumentError when the
    sandbox refuses the program, UnavailableError when every attempt failed.
    """
    for pause_s in (*PAUSES_S, None):
        try:
            response = await client.execute(request, timeout_s=QUEUE_S + COMPILE_S + 2 * wall_s)
            if response.status not in (pb.STATUS_INFRA_ERROR, pb.STATUS_UNSPECIFIED):
                return response
            failure: PerigeeError = InternalError(response.reason or "no reason given")
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"{what}: {error.message}", violations=error.violations) from error
        except _PASSING as error:
            failure = error
        if pause_s is None:
            break
        await asyncio.sleep(max(pause_s, failure.retry_after_s or 0.0))
    raise UnavailableError(f"{what}: the sandbox failed {len(PAUSES_S) + 1} times: {failure.message}") from failure


def status_name(response: pb.ExecuteResponse) -> str:
    """How the program ended: OK, TIME_LIMIT, ...; output that was cut is OUTPUT_LIMIT."""
    if response.status == pb.STATUS_OK and response.stdout_truncated:
        return "OUTPUT_LIMIT"
    return pb.Status.Name(response.status).removeprefix("STATUS_")


def last_words(response: pb.ExecuteResponse) -> str:
    """Why the program ended as it did, in one line of 200 characters at most."""
    spoken = response.compile.stderr if response.status == pb.STATUS_COMPILE_ERROR else response.stderr
    lines = [line for line in spoken.decode(errors="replace").splitlines() if line.strip()]
    if response.status == pb.STATUS_COMPILE_ERROR:
        return (lines[0] if lines else response.reason)[:200]
    if response.status == pb.STATUS_RUNTIME_ERROR and lines:
        return lines[-1].strip()[:200]
    how = f"signal {response.signal}" if response.signal else f"exit code {response.exit_code}"
    return (response.reason or how)[:200]
