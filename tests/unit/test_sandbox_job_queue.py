"""The queue before the slots: order, bounds, cancellation."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perigee.errors import ResourceExhaustedError, UnavailableError
from services.sandbox.config import SandboxConfig
from services.sandbox.runtime.job_queue import JobQueue
from services.sandbox.runtime.pool import Pool
from services.sandbox.runtime.worker_slots import SlotPair, WorkerSlot


class Clock:
    """A time that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(slots: int = 1, clock: Clock | None = None, **bounds: Any) -> JobQueue[str]:
    settings = {
        "max_waiting": 100,
        "max_wait_s": 1000.0,
        "priority_window_s": 10.0,
        "clock": clock or Clock(),
        **bounds,
    }
    queue: JobQueue[str] = JobQueue(**settings)
    for index in range(slots):
        queue.add(f"slot {index}")
    return queue


async def begin(job: Coroutine[Any, Any, str]) -> asyncio.Task[str]:
    """The job's task, once it has come to its first wait."""
    task = asyncio.create_task(job)
    await asyncio.sleep(0)
    return task


async def let_tasks_run() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def serve_once(queue: JobQueue[str], clock: Clock, service_s: float) -> None:
    """Lets one turn of this length pass."""
    async with queue.lease(1):
        clock.now += service_s


async def test_slots_go_out_at_once_while_there_are_free_ones() -> None:
    queue = make(slots=2)
    async with queue.lease(1) as first, queue.lease(1) as second:
        assert {first, second} == {"slot 0", "slot 1"}
        assert (queue.busy, queue.free, queue.waiting) == (2, 0, 0)
    assert (queue.busy, queue.free, queue.waiting) == (0, 2, 0)


async def test_equal_jobs_are_served_as_they_come() -> None:
    queue = make()
    served: list[int] = []

    async def job(number: int) -> str:
        async with queue.lease(1) as slot:
            served.append(number)
            await asyncio.sleep(0)
        return slot

    await asyncio.gather(*map(job, range(20)))
    assert served == list(range(20))


async def test_a_small_job_overtakes_a_large_one_that_came_just_before() -> None:
    clock = Clock()
    queue = make(clock=clock)
    slot = await queue.acquire(1)
    large = await begin(queue.acquire(60))
    clock.now += 5
    small = await begin(queue.acquire(1))
    queue.release(slot)
    await let_tasks_run()
    assert small.done()
    assert not large.done()
    clock.now += 4.5  # a small job now would be due 0.5 s after the large one
    late = await begin(queue.acquire(1))
    queue.release(small.result())
    await let_tasks_run()
    assert large.done()
    assert not late.done()
    queue.release(large.result())
    queue.release(await late)


EVENTS = st.lists(
    st.tuples(st.sampled_from(["arrive", "free"]), st.floats(0, 30), st.floats(0, 5)), min_size=1, max_size=60
)


@settings(deadline=None)
@given(EVENTS, st.integers(1, 3), st.floats(0, 20))
def test_nobody_is_overtaken_by_who_comes_later_than_the_bound(
    events: list[tuple[str, float, float]], slots: int, priority_window_s: float
) -> None:
    """Whoever is served before a waiting job came at most its cost, and at most the bound, after it."""

    async def run() -> None:
        clock = Clock()
        queue = make(slots, clock, priority_window_s=priority_window_s)
        waiting: dict[int, tuple[float, float]] = {}
        held: list[str] = []
        served = 0

        async def job(number: int, cost_s: float) -> str:
            nonlocal served
            waiting[number] = (clock.now, cost_s)
            slot = await queue.acquire(cost_s)
            arrival, _ = waiting.pop(number)
            for other_arrival, other_cost in waiting.values():
                assert arrival <= other_arrival + min(other_cost, priority_window_s)
            held.append(slot)
            served += 1
            return slot

        tasks = []
        for number, (event, cost_s, pause_s) in enumerate(events):
            clock.now += pause_s
            if event == "arrive":
                tasks.append(await begin(job(number, cost_s)))
            elif held:
                queue.release(held.pop(0))
                await let_tasks_run()
        while served < len(tasks):
            queue.release(held.pop(0))
            await let_tasks_run()
        await asyncio.gather(*tasks)
        assert waiting == {}

    asyncio.run(run())


async def test_a_full_line_refuses_with_an_estimate() -> None:
    clock = Clock()
    queue = make(slots=2, clock=clock, max_waiting=2)
    for _ in range(100):
        await serve_once(queue, clock, 4)
    held = [await queue.acquire(1), await queue.acquire(1)]
    tasks = [await begin(queue.acquire(1)) for _ in range(2)]
    with pytest.raises(ResourceExhaustedError, match="2 jobs wait already") as error:
        await queue.acquire(1)
    assert error.value.retry_after_s == pytest.approx(3 * 4 / 2)
    assert queue.waiting == 2
    for slot in held:
        queue.release(slot)
    assert queue.waiting == 0
    await asyncio.gather(*tasks)


async def test_no_line_at_all_is_a_line() -> None:
    queue = make(max_waiting=0)
    async with queue.lease(1):
        with pytest.raises(ResourceExhaustedError) as error:
            await queue.acquire(1)
        assert error.value.retry_after_s == 0.1
    async with queue.lease(1):
        pass


async def test_who_cannot_be_served_in_time_is_refused_at_once() -> None:
    clock = Clock()
    queue = make(clock=clock)
    await serve_once(queue, clock, 4)
    async with queue.lease(1):
        tasks = [await begin(queue.acquire(1, remaining_s=30)) for _ in range(3)]
        assert queue.estimate_wait_s(1) == pytest.approx(16)
        with pytest.raises(ResourceExhaustedError, match=r"about 16\.0 s is longer than the 15\.0 s left") as error:
            await queue.acquire(1, remaining_s=15)
        assert error.value.retry_after_s == pytest.approx(16)
        patient = await begin(queue.acquire(1, remaining_s=17))
        # a small job would be served before those three
        clock.now -= 5
        assert queue.estimate_wait_s(1) == pytest.approx(4)
    for task in [*tasks, patient]:
        queue.release(await task)
    assert queue.estimate_wait_s(1) == 0


async def test_large_jobs_wait_for_the_small_ones_before_them() -> None:
    clock = Clock()
    queue = make(clock=clock)
    await serve_once(queue, clock, 2)
    async with queue.lease(1):
        tasks = [await begin(queue.acquire(3)) for _ in range(4)]
        assert queue.estimate_wait_s(1) == pytest.approx(2)
        assert queue.estimate_wait_s(5) == pytest.approx(10)
    for task in tasks:
        queue.release(await task)


async def test_waiting_ends_with_a_refusal_never_in_silence() -> None:
    queue = make(max_wait_s=0.01)
    slot = await queue.acquire(1)
    with pytest.raises(ResourceExhaustedError, match=r"no slot was free for 0\.0 s") as error:
        await queue.acquire(1)
    assert error.value.retry_after_s is not None
    patient = make(max_wait_s=1000.0)
    await patient.acquire(1)
    with pytest.raises(ResourceExhaustedError):
        await patient.acquire(1, remaining_s=0.01)
    assert (queue.waiting, patient.waiting) == (0, 0)
    queue.release(slot)
    assert await queue.acquire(1) == slot


async def test_who_stops_waiting_leaves_the_line_and_the_next_moves_up() -> None:
    queue = make(max_waiting=2)
    slot = await queue.acquire(1)
    first, second = await begin(queue.acquire(1)), await begin(queue.acquire(1))
    first.cancel()
    await let_tasks_run()
    assert queue.waiting == 1
    third = await begin(queue.acquire(1))
    queue.release(slot)
    assert await second == slot
    queue.release(slot)
    assert await third == slot


@pytest.mark.parametrize("cancel_first", [True, False])
async def test_a_slot_handed_to_who_is_just_leaving_goes_to_the_next(cancel_first: bool) -> None:
    queue = make()
    slot = await queue.acquire(1)
    leaving, next_one = await begin(queue.acquire(1)), await begin(queue.acquire(1))
    if cancel_first:
        leaving.cancel()
        queue.release(slot)
    else:
        queue.release(slot)
        leaving.cancel()
    assert await next_one == slot
    assert leaving.cancelled()
    queue.release(slot)
    assert (queue.busy, queue.free, queue.waiting) == (0, 1, 0)


@pytest.mark.parametrize("seed", range(100))
async def test_no_slot_is_lost_or_shared_whatever_is_cancelled_when(seed: int) -> None:
    choose = random.Random(seed)
    queue = make(slots=choose.randint(1, 3), max_waiting=10, max_wait_s=choose.choice([0.0, 0.001, 1000.0]))
    slots = queue.free
    in_use: set[str] = set()

    async def job() -> None:
        for _ in range(choose.randrange(3)):
            await asyncio.sleep(0)
        async with queue.lease(choose.random() * 20, choose.choice([None, 0.001, 1000.0])) as slot:
            assert slot not in in_use
            in_use.add(slot)
            try:
                for _ in range(choose.randrange(4)):
                    await asyncio.sleep(0)
            finally:
                in_use.remove(slot)

    tasks = [asyncio.create_task(job()) for _ in range(30)]
    while not all(task.done() for task in tasks):
        for task in choose.sample(tasks, choose.randrange(3)):
            task.cancel()
        await asyncio.sleep(0)
        assert queue.busy + queue.free == slots
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert result is None or isinstance(result, asyncio.CancelledError | ResourceExhaustedError)
    assert (queue.busy, queue.free, queue.waiting) == (0, slots, 0)


async def test_closing_refuses_all_who_wait_and_all_who_come() -> None:
    queue = make()
    slot = await queue.acquire(1)
    waiting = await begin(queue.acquire(1))
    queue.close()
    with pytest.raises(UnavailableError):
        await waiting
    with pytest.raises(UnavailableError):
        await queue.acquire(1)
    queue.release(slot)
    assert (queue.busy, queue.waiting) == (0, 0)


def test_the_old_key_of_the_priority_window_is_accepted_with_a_warning() -> None:
    with pytest.warns(FutureWarning, match="priority_window_seconds"):
        config = SandboxConfig.model_validate({"overtaking_seconds": 7})
    assert config.priority_window_seconds == 7


async def test_a_job_that_is_to_be_alone_has_all_slots_and_gives_them_back() -> None:
    pairs = [SlotPair(*(WorkerSlot(f"{n}{side}", 60001 + n, Path(), None) for side in "ab")) for n in range(3)]
    pool = Pool(SandboxConfig(), None, None, pairs, [])  # type: ignore[arg-type]
    order = []

    async def run(name: str, lease: AbstractAsyncContextManager[SlotPair]) -> None:
        async with lease:
            order.append(name)
            await asyncio.sleep(0)
            order.append(name)

    async with asyncio.TaskGroup() as group, pool.lease(1):
        alone = [group.create_task(run(name, pool.lease_alone(1))) for name in "ab"]
        await let_tasks_run()
        assert order == []
        group.create_task(run("c", pool.lease(1)))
        alone[0].cancel()
        await let_tasks_run()
        assert order == ["c", "c"]
    assert order[2:] == ["b", "b"]
