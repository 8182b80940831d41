"""Finds the point at which a response has become a pattern that only repeats itself.

The engine has a detector of its own, which sees one request's output. A response is generated in segments here, one
request each, so a pattern that spans segments would escape it; this one carries its state over them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from perigee.rollout.v1 import rollout_pb2 as pb

BLOCK_TOKENS = 512


class RepetitionDetector:
    """Reads a response in pieces of any size and finds a tail of at most `max_period` tokens that stands `min_repeats`
    times in a row; time is linear in the tokens.

    For each period p it counts how many of the latest tokens equal the token p places before them; the tail has
    period p and stands n times once that count reaches p * (n - 1).
    """

    def __init__(self, stop: pb.RepetitionStop) -> None:
        self._max_period = stop.max_period
        periods_P = np.arange(1, stop.max_period + 1)
        self._periods_P = periods_P
        self._needed_P = periods_P * (stop.min_repeats - 1)
        self._runs_P = np.zeros(stop.max_period, dtype=np.int64)
        # The latest max_period tokens; -1 stands for places before the response.
        self._tail_P: NDArray[np.int64] = np.full(stop.max_period, -1, dtype=np.int64)

    def feed(self, token_ids: Sequence[int]) -> int | None:
        """Returns the number of these tokens after which the response first repeats; None when it does not."""
        for start in range(0, len(token_ids), BLOCK_TOKENS):
            cut = self._feed_block(np.asarray(token_ids[start : start + BLOCK_TOKENS], dtype=np.int64))
            if cut is not None:
                return start + cut
        return None

    def _feed_block(self, tokens_T: NDArray[np.int64]) -> int | None:
        """Returns what `feed` returns, for a block of at least one token."""
        max_period, length = self._max_period, len(tokens_T)
        joined = np.concatenate([self._tail_P, tokens_T])
        # earlier_TP[t, p - 1] is the token p places before token t.
        earlier_TP = np.lib.stride_tricks.sliding_window_view(joined, max_period)[:length, ::-1]
        equal_TP = earlier_TP == tokens_T[:, None]
        place_T1 = np.arange(1, length + 1)[:, None]
        # A run begins after the latest mismatch; one with none in this block goes on from the blocks before.
        broken_TP = np.maximum.accumulate(np.where(equal_TP, 0, place_T1), axis=0)
        runs_TP = place_T1 - broken_TP + np.where(broken_TP == 0, self._runs_P, 0)
        self._runs_P = runs_TP[-1]
        self._tail_P = joined[-max_period:]
        hit_T = (runs_TP >= self._needed_P).any(axis=1)
        return int(hit_T.argmax()) + 1 if hit_T.any() else None
