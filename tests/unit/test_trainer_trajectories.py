"""Trajectories as the trainer's arrays."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from perigee.buffer.client import StoredTrajectory
from perigee.buffer.packing import pack_logprobs, pack_token_ids
from perigee.buffer.v1 import buffer_pb2 as pb
from perigee.errors import FailedPreconditionError
from services.trainer.trajectories import view_trajectory

STORED = StoredTrajectory(
    trajectory_id="t",
    prompt_token_ids=pack_token_ids([5, 6]),
    token_ids=pack_token_ids([7, 8, 9]),
    logprobs=pack_logprobs([-0.5, -0.25, -1]),
    versions=[pb.VersionSpan(policy_version=3, tokens=1), pb.VersionSpan(policy_version=4, tokens=2)],
    end_reason=pb.END_REASON_STOP,
    epoch=1,
)


def test_every_token_has_its_logprob_and_version() -> None:
    trajectory = view_trajectory(STORED)
    assert trajectory.prompt_tokens.tolist() == [5, 6]
    assert trajectory.tokens_T.tolist() == [7, 8, 9]
    assert trajectory.versions_T.tolist() == [3, 4, 4]
    assert trajectory.engine_logprobs_T.tolist() == [-0.5, -0.25, -1]
    assert trajectory.engine_logprobs_T.dtype == np.float32


def test_a_partial_trajectory_is_refused() -> None:
    with pytest.raises(FailedPreconditionError, match="has not ended"):
        view_trajectory(replace(STORED, end_reason=pb.END_REASON_BUDGET))
