"""What a judge may cost: calls and tokens in any minute, which wait, and in total, which end in refusals."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from services.reward.config import JudgeEndpointConfig
from services.reward.judging.votes import TransientError, VoteError

PERIOD_S = 60.0


class BudgetSpentError(VoteError):
    """The process's total is spent."""


@dataclass(eq=False)
class Reservation:
    """A call's place in the budget: tokens are an estimate until it is settled."""

    start: float
    tokens: int


class Budget:
    """Admits calls first come, first served, such that no limit is ever exceeded by what they may use.

    A call whose estimate alone exceeds the tokens of a minute is admitted when there is no other in that minute.
    """

    def __init__(self, config: JudgeEndpointConfig, period_s: float = PERIOD_S) -> None:
        self.used_calls = 0
        self.used_tokens = 0
        self._config = config
        self._period_s = period_s
        self._recent: deque[Reservation] = deque()
        self._in_flight: set[Reservation] = set()
        self._turn = asyncio.Lock()
        self._settled = asyncio.Event()

    async def reserve(self, tokens: int, wait_s: float | None = None) -> Reservation:
        """Waits until a call of at most that many tokens is within the limits; `wait_s` bounds the wait.

        Raises BudgetSpentError, and TransientError when the wait is over.
        """
        try:
            async with asyncio.timeout(wait_s), self._turn:
                while True:
                    pause_s = self._pause_s(tokens)
                    if pause_s == 0:
                        break
                    self._settled.clear()
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._settled.wait(), pause_s)
        except TimeoutError as error:
            raise TransientError(
                "the judge's calls_per_minute or tokens_per_minute is used up", retry_after_s=self._period_s
            ) from error
        reservation = Reservation(time.monotonic(), tokens)
        self._recent.append(reservation)
        self._in_flight.add(reservation)
        self.used_calls += 1
        return reservation

    def settle(self, reservation: Reservation, tokens: int | None) -> None:
        """Ends a call that took that many tokens; None when nobody knows, which counts as the estimate."""
        if tokens is not None:
            reservation.tokens = tokens
        self.used_tokens += reservation.tokens
        self._in_flight.discard(reservation)
        self._settled.set()

    def _pause_s(self, tokens: int) -> float | None:
        """How long to wait before looking again: 0 when the call fits, None for until another call ends."""
        config, now = self._config, time.monotonic()
        reserved = sum(reservation.tokens for reservation in self._in_flight)
        if config.total_calls is not None and self.used_calls >= config.total_calls:
            raise BudgetSpentError(f"the judge's total_calls = {config.total_calls} are spent")
        if config.total_tokens is not None and self.used_tokens + reserved + tokens > config.total_tokens:
            if self._in_flight:  # they may take less than they reserve
                return None
            raise BudgetSpentError(
                f"the judge's total_tokens = {config.total_tokens} are spent: {self.used_tokens} are used and a call "
                f"may take {tokens}"
            )
        while self._recent and self._recent[0].start + self._period_s <= now:
            self._recent.popleft()
        if not self._recent:
            return 0
        until_next_s = self._recent[0].start + self._period_s - now
        if config.calls_per_minute is not None and len(self._recent) >= config.calls_per_minute:
            return until_next_s
        recent_tokens = sum(reservation.tokens for reservation in self._recent)
        if config.tokens_per_minute is not None and recent_tokens + tokens > config.tokens_per_minute:
            return until_next_s
        return 0
