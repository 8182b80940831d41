"""The buffer's values as protobuf messages."""

from __future__ import annotations

from collections.abc import Sequence

from perigee.buffer.v1 import buffer_pb2 as pb
from services.buffer.packing import unpack_logprobs, unpack_tokens
from services.buffer.types import EndReason, Group, Piece, RunState, Span, Trajectory


def write_run(state: RunState) -> pb.RunState:
    """A run's state."""
    return pb.RunState(
        run_id=state.run_id,
        config_digest=state.config_digest,
        iteration=state.iteration,
        policy_version=state.policy_version,
        coordinator_state=state.coordinator_state,
    )


def write_group(group: Group) -> pb.GroupSummary:
    """A group with the state of its trajectories."""
    return pb.GroupSummary(
        group_id=group.group_id,
        prompt_id=group.prompt_id,
        iteration=group.iteration,
        trajectories=[_write_trajectory(trajectory) for trajectory in group.trajectories],
    )


def write_piece(piece: Piece) -> pb.ReadTrajectoriesResponse:
    """A piece of a trajectory."""
    return pb.ReadTrajectoriesResponse(
        trajectory_id=piece.trajectory_id,
        prompt_token_ids=unpack_tokens(piece.prompt).tolist(),
        offset=piece.offset,
        token_ids=unpack_tokens(piece.tokens).tolist(),
        logprobs=unpack_logprobs(piece.logprobs).tolist(),
        versions=_write_spans(piece.spans),
        last=piece.last,
        end_reason=pb.EndReason.ValueType(piece.ending),
        epoch=piece.epoch,
    )


def _write_trajectory(trajectory: Trajectory) -> pb.TrajectorySummary:
    return pb.TrajectorySummary(
        trajectory_id=trajectory.trajectory_id,
        state=_state_of(trajectory),
        tokens=trajectory.tokens,
        epoch=trajectory.epoch,
        end_reason=pb.EndReason.ValueType(trajectory.ending if trajectory.ending.finishes else EndReason.OPEN),
        verdict=pb.Verdict.ValueType(trajectory.verdict),
        reward=trajectory.reward,
        versions=_write_spans(trajectory.spans),
    )


def _state_of(trajectory: Trajectory) -> pb.TrajectoryState.ValueType:
    if trajectory.ending.finishes:
        return pb.TRAJECTORY_STATE_FINISHED
    return pb.TRAJECTORY_STATE_PARTIAL if trajectory.tokens else pb.TRAJECTORY_STATE_PENDING


def _write_spans(spans: Sequence[Span]) -> list[pb.VersionSpan]:
    return [pb.VersionSpan(policy_version=span.policy_version, tokens=span.tokens) for span in spans]
