"""Trajectories out of the buffer's pieces: joined exactly, or refused."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perigee.buffer.v1 import buffer_pb2 as pb
from perigee.errors import DataLossError, FailedPreconditionError, PerigeeError
from services.trainer.trajectories import join_pieces


def cut(tokens: list[int], versions: list[int], cuts: list[int]) -> list[pb.ReadTrajectoriesResponse]:
    """The pieces of a trajectory, cut at the given offsets, one span per token."""
    edges = sorted({0, len(tokens), *(c for c in cuts if c < len(tokens))})
    pieces = [
        pb.ReadTrajectoriesResponse(
            trajectory_id="t",
            offset=a,
            token_ids=tokens[a:b],
            logprobs=[-token / 100 for token in tokens[a:b]],
            versions=[pb.VersionSpan(policy_version=v, tokens=1) for v in versions[a:b]],
        )
        for a, b in pairwise(edges)
    ]
    pieces[0].prompt_token_ids.extend([5, 6])
    pieces[-1].last, pieces[-1].end_reason = True, pb.END_REASON_STOP
    return pieces


@given(st.lists(st.integers(0, 99), min_size=1, max_size=60), st.lists(st.integers(0, 59), max_size=6))
def test_pieces_join_wherever_they_were_cut(tokens: list[int], cuts: list[int]) -> None:
    versions = [i // 7 for i in range(len(tokens))]
    trajectory = join_pieces(cut(tokens, versions, cuts))
    assert trajectory.prompt_tokens.tolist() == [5, 6]
    assert trajectory.tokens_T.tolist() == tokens
    assert trajectory.versions_T.tolist() == versions
    assert np.allclose(trajectory.engine_logprobs_T, np.array(tokens) / -100)


def test_what_does_not_fit_together_is_refused() -> None:
    def refuse(pieces: list[pb.ReadTrajectoriesResponse], error: type[PerigeeError], message: str) -> None:
        with pytest.raises(error, match=message):
            join_pieces(pieces)

    whole = list(range(9))
    first, middle, last = cut(whole, [0] * 9, [3, 6])
    refuse([first, last], DataLossError, "a piece at offset 6 came where 3 was due")
    partial = cut(whole, [0] * 9, [])
    partial[0].end_reason = pb.END_REASON_BUDGET
    refuse(partial, FailedPreconditionError, "has not ended")
    del middle.versions[:]
    refuse([first, middle, last], DataLossError, "9 tokens, 9 log-probabilities, 6 versions")
    damaged = cut(whole, [0] * 9, [])
    damaged[0].logprobs[4] = float("nan")
    refuse(damaged, DataLossError, "not finite")
