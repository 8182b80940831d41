"""Batches of what arrives together: their bounds, their failures, and callers that go away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from perigee.errors import InternalError, UnavailableError
from services.reward.verifiers.value_head import MicroBatcher


class Scoring:
    """Scores a sequence with its length; keeps the batches, waits for `gate`, and raises `error` when there is one."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.called = asyncio.Event()
        self.error: Exception | None = None

    async def score(self, sequences: list[Sequence[int]]) -> list[int]:
        lengths = [len(sequence) for sequence in sequences]
        self.batches.append(lengths)
        self.called.set()
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return lengths


@asynccontextmanager
async def running(
    scoring: Scoring, max_tokens: int = 100, max_items: int = 10, wait_s: float = 0.01
) -> AsyncIterator[MicroBatcher[int]]:
    batcher = MicroBatcher(scoring.score, max_tokens, max_items, wait_s)
    await batcher.start()
    try:
        yield batcher
    finally:
        await batcher.close()


async def test_what_arrives_together_is_one_batch_and_each_gets_its_own_result() -> None:
    scoring = Scoring()
    async with running(scoring) as batcher:
        assert await asyncio.gather(*(batcher.submit([0] * length) for length in (3, 1, 2))) == [3, 1, 2]
    assert scoring.batches == [[3, 1, 2]]


async def test_batches_stay_within_padded_tokens_and_items_in_the_order_of_arrival() -> None:
    scoring = Scoring()
    lengths = [10, 10, 30, 40, 5, 200, 1, 1, 1, 1]
    async with running(scoring, max_tokens=100, max_items=3) as batcher:
        assert await asyncio.gather(*(batcher.submit([0] * length) for length in lengths)) == lengths
    assert scoring.batches == [[10, 10, 30], [40, 5], [200], [1, 1, 1], [1]]


async def test_a_full_batch_does_not_wait() -> None:
    scoring = Scoring()
    async with running(scoring, max_items=2, wait_s=3600) as batcher:
        assert await asyncio.gather(batcher.submit([0]), batcher.submit([0, 0])) == [1, 2]


async def test_what_arrives_during_a_batch_is_the_next_one() -> None:
    scoring = Scoring()
    scoring.gate.clear()
    async with running(scoring) as batcher:
        first = asyncio.create_task(batcher.submit([0]))
        await scoring.called.wait()
        others = [asyncio.create_task(batcher.submit([0] * length)) for length in (2, 3, 4)]
        await asyncio.sleep(0)
        scoring.gate.set()
        assert await asyncio.gather(first, *others) == [1, 2, 3, 4]
    assert scoring.batches == [[1], [2, 3, 4]]


@pytest.mark.parametrize(
    ("error", "raised"), [(UnavailableError("gone"), UnavailableError), (KeyError("scores"), InternalError)]
)
async def test_a_batch_that_fails_fails_alone(error: Exception, raised: type[Exception]) -> None:
    scoring = Scoring()
    async with running(scoring) as batcher:
        scoring.error = error
        results = await asyncio.gather(batcher.submit([0]), batcher.submit([0]), return_exceptions=True)
        assert [type(result) for result in results] == [raised, raised]
        scoring.error = None
        assert await batcher.submit([0]) == 1


async def test_a_caller_that_goes_away_is_left_out() -> None:
    scoring = Scoring()
    async with running(scoring) as batcher:
        gone = asyncio.create_task(batcher.submit([0] * 7))
        staying = asyncio.create_task(batcher.submit([0]))
        await asyncio.sleep(0)
        gone.cancel()
        assert await staying == 1
    assert scoring.batches == [[1]]


async def test_closing_leaves_nobody_waiting() -> None:
    scoring = Scoring()
    scoring.gate.clear()
    async with running(scoring) as batcher:
        first = asyncio.create_task(batcher.submit([0]))
        await scoring.called.wait()
        second = asyncio.create_task(batcher.submit([0]))
        await asyncio.sleep(0)
    results = await asyncio.gather(first, second, return_exceptions=True)
    assert [type(result) for result in results] == [UnavailableError, UnavailableError]
