"""Producers merged into one stream: nothing lost, errors raised, nobody left behind."""

import asyncio
from functools import partial

import pytest

from services.rollout.segment import Emit, merge


async def count(start: int, emit: Emit[int]) -> None:
    for value in range(start, start + 1000):
        await emit(value)


async def test_everything_arrives_in_the_order_of_its_producer() -> None:
    values = [value async for batch in merge([partial(count, start) for start in (0, 10000, 20000)]) for value in batch]
    assert len(values) == 3000
    for start in (0, 10000, 20000):
        assert [value for value in values if start <= value < start + 1000] == list(range(start, start + 1000))


async def test_no_producers_is_an_empty_stream() -> None:
    assert [batch async for batch in merge([])] == []


async def test_an_error_cancels_the_others_and_is_raised() -> None:
    cancelled = asyncio.Event()

    async def wait(_emit: Emit[int]) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def fail(emit: Emit[int]) -> None:
        await emit(1)
        raise ValueError("broken")

    stream = merge([wait, fail])
    assert await anext(stream) == [1]
    with pytest.raises(ValueError, match="broken"):
        await anext(stream)
    assert cancelled.is_set()


async def test_closing_stops_producers_that_wait_for_room() -> None:
    producing: set[asyncio.Task[None] | None] = set()

    async def produce(start: int, emit: Emit[int]) -> None:
        producing.add(asyncio.current_task())
        await count(start, emit)

    stream = merge([partial(produce, start) for start in (0, 10000, 20000)])
    await anext(stream)
    await stream.aclose()
    assert len(producing) == 3
    assert not producing & asyncio.all_tasks()


async def test_the_error_of_a_producers_own_group_is_raised_as_it_is() -> None:
    async def fail(_emit: Emit[int]) -> None:
        raise ValueError("broken")

    async def nest(emit: Emit[int]) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail(emit))

    with pytest.raises(ValueError, match="broken"):
        await anext(merge([nest]))
