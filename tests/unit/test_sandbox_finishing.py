"""Work that gives something back is done to its end."""

from __future__ import annotations

import asyncio

import pytest

from services.sandbox.runtime.failure import finish


async def test_the_result_is_handed_on() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 42

    assert await finish(work()) == 42


async def test_no_number_of_cancellations_ends_it() -> None:
    begun, gate, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        await gate.wait()
        done.set()

    task = asyncio.create_task(finish(work()))
    await begun.wait()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done.is_set()


async def test_its_own_failure_is_reported_also_to_who_was_cancelled() -> None:
    begun, gate = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        await gate.wait()
        raise ValueError("no")

    task = asyncio.create_task(finish(work()))
    await begun.wait()
    task.cancel()
    await asyncio.sleep(0)
    gate.set()
    with pytest.raises(ValueError, match="no"):
        await task
