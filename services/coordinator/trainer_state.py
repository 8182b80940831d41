"""Brings the trainer to the policy version that the run's truth names."""

from __future__ import annotations

import asyncio
import time

from perigee.errors import DeadlineExceededError
from perigee.trainer.v1 import trainer_pb2 as pb
from services.coordinator.context import RunContext

POLL_SECONDS = 0.25


async def wait_until_free(context: RunContext) -> pb.GetStateResponse:
    """The trainer's state once it works on nothing: a job of a coordinator that died may still be ending.

    Raises DeadlineExceededError after `recovery_wait_s`.
    """
    deadline = time.monotonic() + context.settings.recovery_wait_s
    while True:
        state = await context.peers.trainer.get_state(
            pb.GetStateRequest(run_id=context.run_id), timeout_s=context.settings.control_timeout_s
        )
        if not state.busy:
            return state
        if time.monotonic() > deadline:
            raise DeadlineExceededError(
                f"The trainer has been busy with another job for {context.settings.recovery_wait_s:g} s."
            )
        await asyncio.sleep(POLL_SECONDS)


async def hold_version(context: RunContext, version: int) -> None:
    """Has the trainer load the version's checkpoint unless it holds the version already."""
    state = await wait_until_free(context)
    if state.policy_version == version and state.run_id in ("", context.run_id):
        return
    await context.peers.trainer.load_checkpoint(
        pb.LoadCheckpointRequest(run_id=context.run_id, policy_version=version),
        timeout_s=context.settings.checkpoint_timeout_s,
    )
