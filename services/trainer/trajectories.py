"""Trajectories as the trainer needs them, and the reading of them from the buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from perigee.buffer.client import BufferClient
from perigee.buffer.v1 import buffer_pb2 as pb
from perigee.errors import DataLossError, FailedPreconditionError

# Trajectories asked for in one call, so that no request grows with the iteration.
_IDS_PER_CALL = 256


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
    """Whole trajectories by id; `timeout_s` bounds each call, of which there is one per 256 trajectories.

    Raises FailedPreconditionError for one that has not ended, DataLossError for one whose pieces do not fit together.
    """
    trajectories: dict[str, Trajectory] = {}
    for start in range(0, len(trajectory_ids), _IDS_PER_CALL):
        request = pb.ReadTrajectoriesRequest(
            run_id=run_id, trajectory_ids=trajectory_ids[start : start + _IDS_PER_CALL], with_logprobs=True
        )
        pieces: list[pb.ReadTrajectoriesResponse] = []
        async for piece in buffer.read_trajectories(request, timeout_s=timeout_s):
            pieces.append(piece)
            if piece.last:
                trajectory = join_pieces(pieces)
                trajectories[trajectory.trajectory_id] = trajectory
                pieces = []
    missing = [trajectory_id for trajectory_id in trajectory_ids if trajectory_id not in trajectories]
    if missing:
        raise DataLossError(f"the buffer sent no whole trajectory {missing[0]}")
    return trajectories


def join_pieces(pieces: Sequence[pb.ReadTrajectoriesResponse]) -> Trajectory:
    """One trajectory from its pieces, checked for gaps and for one log-probability and version per token."""
    name = pieces[0].trajectory_id
    offset = 0
    for piece in pieces:
        if piece.trajectory_id != name or piece.offset != offset:
            raise DataLossError(f"trajectory {name}: a piece at offset {piece.offset} came where {offset} was due")
        offset += len(piece.token_ids)
    if pieces[-1].end_reason in (pb.END_REASON_UNSPECIFIED, pb.END_REASON_BUDGET):
        raise FailedPreconditionError(f"trajectory {name} has not ended; only complete groups are trained")
    spans = [span for piece in pieces for span in piece.versions]
    trajectory = Trajectory(
        trajectory_id=name,
        prompt_tokens=np.array(pieces[0].prompt_token_ids, dtype=np.int64),
        tokens_T=np.concatenate([np.array(piece.token_ids, dtype=np.int64) for piece in pieces]),
        engine_logprobs_T=np.concatenate([np.array(piece.logprobs, dtype=np.float32) for piece in pieces]),
        versions_T=np.repeat(
            np.array([span.policy_version for span in spans], dtype=np.int64),
            np.array([span.tokens for span in spans], dtype=np.int64),
        ),
    )
    if not len(trajectory.tokens_T) == len(trajectory.engine_logprobs_T) == len(trajectory.versions_T):
        raise DataLossError(
            f"trajectory {name}: {len(trajectory.tokens_T)} tokens, {len(trajectory.engine_logprobs_T)} "
            f"log-probabilities, {len(trajectory.versions_T)} versions"
        )
    if not np.isfinite(trajectory.engine_logprobs_T).all():
        raise DataLossError(f"trajectory {name}: a log-probability is not finite")
    return trajectory
