"""Finds the point at which a response has become a pattern that only repeats itself.

The engine has a detector of its own, which sees one request's output. A response is generated in segments here, one
request each, so a pattern that spans segments would escape it; this one carries its state over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK_TOKENS = 512


@dataclass(frozen=True)
class RepetitionRule:
    """A tail of at most `max_period` tokens that stands at least `min_repeats` times in a row."""

    max_period: int
    min_repeats: int

    @property
    def window_tokens(self) -> int:
        """Tokens before the present that can take part in a match."""
        return self.max_period * self.min_repeats


class RepetitionDetector:
    """Reads a response token by token, in pieces of any size; time is linear in the tokens.

    For each period p it counts how many of the latest tokens equal the token p places before them; the tail has
    period p and stands n times once that count reaches p * (n - 1).
    """

    def __init__(self, rule: RepetitionRule) -> None:
        self._rule = rule
        periods_P = np.arange(1, rule.max_period + 1)
        self._periods_P = periods_P
        self._needed_P = periods_P * (rule.min_repeats - 1)
        self._runs_P = np.zeros(rule.max_period, dtype=np.int64)
        # The latest max_period tokens; -1 stands for places before the response.
        self._tail_P: NDArray[np.int64] = np.full(rule.max_period, -1, dtype=np.int64)

    def feed(self, token_ids: Sequence[int]) -> int | None:
        """The number of these tokens after which the response first repeats; None when it does not."""
        for start in range(0, len(token_ids), BLOCK_TOKENS):
            cut = self._feed_block(np.asarray(token_ids[start : start + BLOCK_TOKENS], dtype=np.int64))
            if cut is not None:
                return start + cut
        return None

    def _feed_block(self, tokens_T: NDArray[np.int64]) -> int | None:
        max_period, length = self._rule.max_period, len(tokens_T)
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
