"""Trajectories out of the buffer's pieces: joined exactly, or refused."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perigee.buffer.client import BufferClient, join_pieces
from perigee.buffer.packing import pack_logprobs, pack_token_ids, unpack_logprobs, unpack_token_ids
from perigee.buffer.v1 import buffer_pb2 as pb
from perigee.errors import DataLossError


def cut(
    tokens: Sequence[int], versions: Sequence[int], cuts: Sequence[int], name: str = "t"
) -> list[pb.ReadTrajectoriesResponse]:
    """The pieces of a trajectory, cut at the given offsets, one span per token."""
    edges = sorted({0, len(tokens), *(c for c in cuts if c < len(tokens))})
    pieces = [
        pb.ReadTrajectoriesResponse(
            trajectory_id=name,
            offset=a,
            token_ids=pack_token_ids(tokens[a:b]),
            logprobs=pack_logprobs(-token / 4 for token in tokens[a:b]),
            versions=[pb.VersionSpan(policy_version=v, tokens=1) for v in versions[a:b]],
        )
        for a, b in pairwise(edges)
    ]
    pieces[0].prompt_token_ids = pack_token_ids([5, 6])
    pieces[-1].last, pieces[-1].end_reason, pieces[-1].epoch = True, pb.END_REASON_STOP, 3
    return pieces


@given(st.lists(st.integers(0, 99), min_size=1, max_size=60), st.lists(st.integers(0, 59), max_size=6))
def test_pieces_join_wherever_they_were_cut(tokens: list[int], cuts: list[int]) -> None:
    versions = [i // 7 for i in range(len(tokens))]
    trajectory = join_pieces("t", cut(tokens, versions, cuts), with_logprobs=True)
    assert list(unpack_token_ids(trajectory.prompt_token_ids)) == [5, 6]
    assert list(unpack_token_ids(trajectory.token_ids)) == tokens
    assert list(unpack_logprobs(trajectory.logprobs)) == [-token / 4 for token in tokens]
    assert [span.policy_version for span in trajectory.versions for _ in range(span.tokens)] == versions
    assert (trajectory.tokens, trajectory.finished, trajectory.epoch) == (len(tokens), True, 3)


def test_pieces_that_do_not_fit_together_are_refused() -> None:
    def refuse(pieces: list[pb.ReadTrajectoriesResponse], message: str, with_logprobs: bool = True) -> None:
        with pytest.raises(DataLossError, match=message):
            join_pieces("t", pieces, with_logprobs=with_logprobs)

    whole = list(range(9))
    first, middle, last = cut(whole, [0] * 9, [3, 6])
    refuse([first, last], "piece of t at offset 6 came where offset 3 was due")
    refuse([first, *cut(whole, [0] * 9, [3], "u")[1:]], "piece of u at offset 3")
    del middle.versions[:]
    refuse([first, middle, last], "9 tokens, 9 log-probabilities, 6 versions")
    damaged = cut(whole, [0] * 9, [])
    damaged[0].logprobs = pack_logprobs([float("nan")] * 9)
    refuse(damaged, "not finite")
    damaged[0].logprobs = b""
    refuse(damaged, "9 tokens, 0 log-probabilities, 9 versions")
    assert join_pieces("t", damaged, with_logprobs=False).logprobs == b""


class ScriptedPieces(BufferClient):
    """A client whose calls stream these pieces."""

    def __init__(self, pieces: Sequence[pb.ReadTrajectoriesResponse]) -> None:
        self.pieces = pieces

    async def read_pieces(
        self, request: pb.ReadTrajectoriesRequest, *, timeout_s: float = 60.0
    ) -> AsyncIterator[pb.ReadTrajectoriesResponse]:
        for piece in self.pieces:
            yield piece


async def test_a_stream_that_ends_early_or_brings_another_trajectory_is_refused() -> None:
    one, two = cut(range(9), [0] * 9, [4], "one"), cut(range(5), [0] * 5, [], "two")
    stored = ScriptedPieces([*one, *two]).read_trajectories("run", ["one", "two"], with_logprobs=True)
    assert [trajectory.trajectory_id async for trajectory in stored] == ["one", "two"]
    for pieces, message in (
        ([*one, two[0]][:1], "one: the buffer sent no whole"),
        ([*two], "piece of two at offset 0"),
    ):
        with pytest.raises(DataLossError, match=message):
            async for _ in ScriptedPieces(pieces).read_trajectories("run", ["one", "two"], with_logprobs=True):
                pass
    with pytest.raises(DataLossError, match="two: the buffer sent no whole"):
        async for _ in ScriptedPieces(one).read_trajectories("run", ["one", "two"], with_logprobs=True):
            pass
