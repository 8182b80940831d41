"""Follows a run at the coordinator to its end, through restarts of the coordinator."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

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
from perigee.report.records import last_recorded

# A snapshot in one of these is the last.
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


@dataclass
class Told:
    """The numbers of the last iteration and the last evaluation that were told; 0 for none."""

    iteration: int = 0
    evaluation: int = 0


def read_told(run_path: Path) -> Told:
    """What the run's folder holds, as told: a run that goes on does not tell it again.

    To be read before the run is started, which records more. Raises InvalidArgumentError naming the line that cannot be
    read.
    """
    return Told(*last_recorded(run_path))


async def start_run(client: CoordinatorClient, request: RunRequest) -> bool:
    """Starts the run or goes on with it; True when it goes on."""
    response = await client.start_run(
        pb.StartRunRequest(run_id=request.run_id, config_yaml=request.config_yaml, run_path=request.run_path),
        timeout_s=120.0,
    )
    return response.resumed


async def watch_run(
    client: CoordinatorClient, request: RunRequest, told: Told, note: Callable[[str], None]
) -> AsyncIterator[pb.WatchRunResponse]:
    """What there is to tell of a started run: snapshots, the last of them in a phase of ENDED, and each iteration and
    evaluation after `told` once and in order, those that ended while the coordinator could not be heard included.

    A coordinator that went away is asked to go on with the run once it is back; raises UnavailableError when it stays
    away for SILENCE_S.
    """
    heard_at = time.monotonic()
    while True:
        try:
            watch = pb.WatchRunRequest(
                run_id=request.run_id, after_iteration=told.iteration, after_evaluation=told.evaluation
            )
            async for response in client.watch_run(watch, timeout_s=STREAM_S):
                heard_at = time.monotonic()
                if response.HasField("iteration"):
                    told.iteration = response.iteration.iteration
                if response.HasField("evaluation"):
                    told.evaluation = response.evaluation.number
                yield response
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
