"""Follows a run at the coordinator to its end, through restarts of the coordinator."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from perigee.coordinator.client import CoordinatorClient
from perigee.coordinator.v1 import coordinator_pb2 as pb
from perigee.errors import (
    CancelledError,
    DeadlineExceededError,
    InternalError,
    NotFoundError,
    PerigeeError,
    UnavailableError,
)

ENDED = (pb.RUN_PHASE_FINISHED, pb.RUN_PHASE_FAILED, pb.RUN_PHASE_STOPPED)
# One stream lasts this long at most; the next one continues it.
STREAM_S = 3600.0
RECONNECT_S = 1.0
# Without a snapshot for so long the coordinator is given up.
SILENCE_S = 300.0
_PASSING = (UnavailableError, DeadlineExceededError, NotFoundError, CancelledError)


@dataclass(frozen=True)
class RunRequest:
    """A run to be started: its id, its configuration as YAML, its folder."""

    run_id: str
    config_yaml: str
    run_path: str


async def start_run(client: CoordinatorClient, request: RunRequest) -> bool:
    """Starts the run or goes on with it; True when it goes on."""
    response = await client.start_run(
        pb.StartRunRequest(run_id=request.run_id, config_yaml=request.config_yaml, run_path=request.run_path),
        timeout_s=120.0,
    )
    return response.resumed


async def watch_run(
    client: CoordinatorClient, request: RunRequest, note: Callable[[str], None]
) -> AsyncIterator[pb.RunSnapshot]:
    """Snapshots of a started run, the last of them in a phase of ENDED.

    A coordinator that went away is asked to go on with the run once it is back; raises UnavailableError when it stays
    away for SILENCE_S.
    """
    heard_at = time.monotonic()
    while True:
        try:
            async for response in client.watch_run(pb.WatchRunRequest(run_id=request.run_id), timeout_s=STREAM_S):
                heard_at = time.monotonic()
                yield response.run
                if response.run.phase in ENDED:
                    return
            error: PerigeeError = UnavailableError("the coordinator ended the stream")
        except _PASSING as passing:
            error = passing
        if time.monotonic() - heard_at > SILENCE_S:
            raise UnavailableError(
                f"nothing heard of run {request.run_id} for {SILENCE_S:g} s: {error.message}"
            ) from error
        await asyncio.sleep(RECONNECT_S)
        try:
            await start_run(client, request)
            note("watching the run again")
        except _PASSING as passing:
            error = passing


async def stop_run(client: CoordinatorClient, run_id: str) -> None:
    """Asks the coordinator to end the run; what it has committed stays."""
    await client.stop_run(pb.StopRunRequest(run_id=run_id), timeout_s=20.0)


def check_end(snapshot: pb.RunSnapshot) -> None:
    """Raises InternalError with the coordinator's reason unless the run has finished."""
    if snapshot.phase == pb.RUN_PHASE_FAILED:
        raise InternalError(f"run {snapshot.run_id} failed: {snapshot.error or 'the coordinator gave no reason'}")
    if snapshot.phase == pb.RUN_PHASE_STOPPED:
        raise InternalError(f"run {snapshot.run_id} was stopped at iteration {snapshot.iteration}")
