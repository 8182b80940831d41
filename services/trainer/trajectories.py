"""Trajectories as the trainer needs them, and the reading of them from the buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from perigee.buffer.client import BufferClient, StoredTrajectory
from perigee.errors import FailedPreconditionError


@dataclass(frozen=True)
class Trajectory:
    """A response with its prompt; each of the T response tokens has an engine log-probability and a policy version."""

    trajectory_id: str
    prompt_tokens: npt.NDArray[np.int64]
    tokens_T: npt.NDArray[np.int64]
    engine_logprobs_T: npt.NDArray[np.float32]
    versions_T: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """The trajectories of one prompt that have a reward."""

    group_id: str
    trajectories: tuple[Trajectory, ...]
    rewards: tuple[float, ...]


async def read_trajectories(
    buffer: BufferClient, run_id: str, trajectory_ids: Sequence[str], timeout_s: float
) -> dict[str, Trajectory]:
    """Reads whole trajectories by id; `timeout_s` bounds each call of the buffer.

    Raises FailedPreconditionError for one that has not ended, DataLossError for one whose pieces do not fit together.
    """
    stored = buffer.read_trajectories(run_id, trajectory_ids, with_logprobs=True, timeout_s=timeout_s)
    return {trajectory.trajectory_id: view_trajectory(trajectory) async for trajectory in stored}


def view_trajectory(stored: StoredTrajectory) -> Trajectory:
    """Returns a finished trajectory as arrays; raises FailedPreconditionError for one that has not ended."""
    if not stored.finished:
        raise FailedPreconditionError(
            f"trajectory {stored.trajectory_id} has not ended; only complete groups are trained"
        )
    return Trajectory(
        trajectory_id=stored.trajectory_id,
        prompt_tokens=np.frombuffer(stored.prompt_token_ids, dtype="<u4").astype(np.int64),
        tokens_T=np.frombuffer(stored.token_ids, dtype="<u4").astype(np.int64),
        engine_logprobs_T=np.frombuffer(stored.logprobs, dtype="<f4"),
        versions_T=np.repeat(
            np.array([span.policy_version for span in stored.versions], dtype=np.int64),
            np.array([span.tokens for span in stored.versions], dtype=np.int64),
        ),
    )
