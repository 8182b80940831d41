"""Work that gives something back is done to its end; work beside a service ends it when it fails."""

from __future__ import annotations

import asyncio
import contextlib
import signal

import pytest

from services.kit.server import end_tasks
from services.kit.tasks import finish, keeping_cancellation, start_tasks


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


@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancellation_that_is_lost_within_ends_the_block(fails: bool) -> None:
    begun = asyncio.Event()

    async def lose() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if fails:
                raise ValueError("no") from None

    async def work() -> None:
        with keeping_cancellation():
            await lose()
        await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await begun.wait()
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=5)
    task.cancel()
    assert done == {task}
    assert task.cancelled()


async def test_the_block_takes_no_earlier_cancellation_for_one_within() -> None:
    async def work() -> int:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            with keeping_cancellation():
                await asyncio.sleep(0)
        return 42

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    assert await task == 42


async def test_a_deadline_that_is_lost_within_is_a_timeout() -> None:
    async def work() -> None:
        async with asyncio.timeout(0):
            with keeping_cancellation(), contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await work()


async def test_the_service_ends_with_the_error_of_work_that_fails_beside_it() -> None:
    async def fail() -> None:
        raise KeyError("a bug")

    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    try:
        tasks = start_tasks(fail(), asyncio.Event().wait())
        async with asyncio.timeout(60):
            await ended.wait()
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
    with pytest.raises(KeyError, match="a bug"):
        await end_tasks(*tasks)
    assert all(task.done() for task in tasks)
