"""Scores answers and judges a program with asyncio."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from questions import ANSWERS, OPTIONS, REWARD, SANDBOX, SQUARE, show_judged, show_outcome

from perigee.errors import UNAVAILABLE
from perigee.reward.client import RewardClient
from perigee.reward.scoring import score_items
from perigee.sandbox.client import SandboxClient

T = TypeVar("T")


async def call_again(call: Callable[[], Awaitable[T]], attempts: int = 8) -> T:
    """Makes an idempotent call until the service has room for it, with the pauses that it asks for."""
    for attempt in range(attempts - 1):
        try:
            return await call()
        except UNAVAILABLE as error:
            await asyncio.sleep((error.retry_after_s or 0.1 * 2**attempt) * random.uniform(1, 1.5))
    return await call()


async def main() -> None:
    """Prints the verdicts."""
    async with RewardClient(REWARD, OPTIONS) as reward, SandboxClient(SANDBOX, OPTIONS) as sandbox:
        # Calls in batches, and again where that may help.
        outcomes = [outcome async for outcome in score_items(reward, ANSWERS)]
        for outcome in sorted(outcomes, key=lambda outcome: outcome.id):
            show_outcome(outcome)
        show_judged(await call_again(lambda: sandbox.judge(SQUARE)))


asyncio.run(main())
