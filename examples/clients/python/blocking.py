"""Scores answers and judges a program without asyncio; both clients may be shared by threads."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from questions import ANSWERS, OPTIONS, REWARD, SANDBOX, SQUARE, show_judged, show_outcome

from perigee.errors import UNAVAILABLE
from perigee.reward.adapters.blocking import BlockingScorer
from perigee.sandbox.blocking import BlockingSandbox

T = TypeVar("T")


def call_again(call: Callable[[], T], attempts: int = 8) -> T:
    """Makes an idempotent call until the service has room for it, with the pauses that it asks for."""
    for attempt in range(attempts - 1):
        try:
            return call()
        except UNAVAILABLE as error:
            time.sleep((error.retry_after_s or 0.1 * 2**attempt) * random.uniform(1, 1.5))
    return call()


def main() -> None:
    """Prints the verdicts."""
    # Reads token and certificates from the environment; calls in batches, and again where that may help. The outcomes
    # come in the order of the items.
    for outcome in BlockingScorer(REWARD).score(ANSWERS):
        show_outcome(outcome)
    with BlockingSandbox(SANDBOX, OPTIONS) as sandbox:
        show_judged(call_again(lambda: sandbox.judge(SQUARE)))


main()
