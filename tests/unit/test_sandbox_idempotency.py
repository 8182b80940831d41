"""The same key with the same request runs cache."""

from __future__ import annotations

import asyncio
import random
import tracemalloc
from typing import Any

import pytest

from perigee.errors import InvalidArgumentError, UnavailableError
from services.kit.single_flight import SingleFlightCache


class Work:
    """Counts its runs; ends when `gate` is set, with what the test says."""

    def __init__(self, result: str | Exception = "done", *, waits: bool = False) -> None:
        self.result = result
        self.gate = asyncio.Event()
        self.runs = 0
        self.cancelled = 0
        self.cleaned_up = 0
        if not waits:
            self.gate.set()

    async def __call__(self) -> str:
        self.runs += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            await asyncio.sleep(0)  # as giving a slot back takes a moment
            self.cleaned_up += 1
            raise
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


class Clock:
    """A time that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(**bounds: Any) -> SingleFlightCache[str, str]:
    settings = {"entries": 10, "total_bytes": 100, "ttl_s": 60.0, "size_of": len, **bounds}
    return SingleFlightCache(**settings, key_field="idempotency_key")


async def get(cache: SingleFlightCache[str, str], key: str, request: bytes, work: Work) -> str:
    """Result of a key, whoever's work gave it."""
    result, _ = await cache.get(key, work, request)
    return result


async def begin(cache: SingleFlightCache[str, str], key: str, work: Work, digest: bytes = b"a") -> asyncio.Task[str]:
    """A call's task, cache it waits."""
    task = asyncio.create_task(get(cache, key, digest, work))
    for _ in range(3):
        await asyncio.sleep(0)
    return task


async def test_the_first_result_is_everybody_s() -> None:
    cache, work, other = make(), Work("first"), Work("second")
    assert await get(cache, "k", b"a", work) == "first"
    assert await get(cache, "k", b"a", other) == "first"
    assert await get(cache, "l", b"a", other) == "second"
    assert (work.runs, other.runs) == (1, 1)


async def test_calls_at_the_same_time_join() -> None:
    cache, work = make(), Work(waits=True)
    tasks = [await begin(cache, "k", work) for _ in range(5)]
    work.gate.set()
    assert await asyncio.gather(*tasks) == ["done"] * 5
    assert work.runs == 1


async def test_the_same_key_for_another_request_is_refused() -> None:
    cache, work = make(), Work(waits=True)
    running = await begin(cache, "k", work)
    for _ in range(2):  # while it runs, and afterwards
        with pytest.raises(InvalidArgumentError, match="used for another request") as error:
            await get(cache, "k", b"b", Work())
        assert [violation.field for violation in error.value.violations] == ["idempotency_key"]
        work.gate.set()
        assert await running == "done"


async def test_work_goes_on_while_somebody_waits() -> None:
    cache, work = make(), Work(waits=True)
    first, second = await begin(cache, "k", work), await begin(cache, "k", work)
    first.cancel()
    await asyncio.wait({first})
    assert first.cancelled()
    assert work.cancelled == 0
    work.gate.set()
    assert await second == "done"


async def test_work_ends_with_the_last_who_waits_and_has_ended_then() -> None:
    cache, work = make(), Work(waits=True)
    tasks = [await begin(cache, "k", work) for _ in range(3)]
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert (work.cancelled, work.cleaned_up) == (1, 1)
    again = Work("again")
    assert await get(cache, "k", b"b", again) == "again"


async def test_who_comes_while_abandoned_work_ends_starts_anew() -> None:
    cache, work, again = make(), Work(waits=True), Work("again")
    abandoned = await begin(cache, "k", work)
    abandoned.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (work.cancelled, work.cleaned_up) == (1, 0)
    assert await get(cache, "k", b"a", again) == "again"
    assert abandoned.cancelled()
    assert await get(cache, "k", b"a", work) == "again"


async def test_a_result_is_kept_though_its_last_caller_left_just_then() -> None:
    cache, work = make(), Work(waits=True)
    task = await begin(cache, "k", work)
    work.gate.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert await get(cache, "k", b"a", work) == "done"
    assert work.runs == 1


async def test_failures_are_not_kept() -> None:
    cache = make(is_final=lambda result: result != "infra")
    failing, infra, fine = Work(ValueError("broken")), Work("infra"), Work("fine")
    joined = [asyncio.create_task(get(cache, "k", b"a", failing)) for _ in range(2)]
    errors = await asyncio.gather(*joined, return_exceptions=True)
    assert [str(error) for error in errors] == ["broken", "broken"]
    assert failing.runs == 1
    assert await get(cache, "k", b"other", infra) == "infra"
    assert await get(cache, "k", b"a", fine) == "fine"
    assert cache.kept == 1


async def test_results_live_for_their_time_however_often_they_are_used() -> None:
    clock = Clock()
    cache, work = make(clock=clock, ttl_s=60.0), Work()
    await get(cache, "k", b"a", work)
    clock.now += 30
    await get(cache, "l", b"a", work)
    clock.now += 29
    await get(cache, "k", b"a", work)
    assert work.runs == 2
    clock.now += 1
    await get(cache, "m", b"a", work)
    assert (work.runs, cache.kept) == (3, 2)
    await get(cache, "k", b"b", work)
    assert work.runs == 4


async def test_results_are_bounded_in_number_and_the_oldest_use_goes_first() -> None:
    cache, work = make(entries=2), Work()
    for key in ("1", "2", "1", "3", "1", "2"):  # 2 goes for 3
        await get(cache, key, b"a", work)
    assert (work.runs, cache.kept) == (4, 2)


async def test_results_are_bounded_in_size() -> None:
    cache = make(total_bytes=10)
    for key, size in (("1", 4), ("2", 4), ("3", 4), ("large", 11)):
        await get(cache, key, b"a", Work("x" * size))
    assert (cache.kept, cache.kept_bytes) == (2, 8)
    again = Work("again")
    assert await get(cache, "large", b"a", again) == "again"
    assert (cache.kept, cache.kept_bytes) == (2, 9)


async def test_closing_ends_what_runs_and_says_so() -> None:
    cache, work = make(), Work(waits=True)
    task = await begin(cache, "k", work)
    await cache.close()
    assert (work.cancelled, work.cleaned_up) == (1, 1)
    with pytest.raises(UnavailableError):
        await task


@pytest.mark.parametrize("seed", range(50))
async def test_whoever_stays_gets_the_result_whatever_the_others_do(seed: int) -> None:
    choose = random.Random(seed)
    cache = make(entries=2)
    running = 0

    async def work() -> str:
        nonlocal running
        running += 1
        assert running == 1
        try:
            for _ in range(choose.randrange(4)):
                await asyncio.sleep(0)
            return "done"
        finally:
            running -= 1

    tasks = []
    for _ in range(30):
        tasks.append(asyncio.create_task(get(cache, "k", b"a", work)))
        for task in choose.sample(tasks, min(len(tasks), choose.randrange(3))):
            task.cancel()
        for _ in range(choose.randrange(3)):
            await asyncio.sleep(0)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(result == "done" or isinstance(result, asyncio.CancelledError) for result in results)
    assert running == 0


async def test_large_requests_are_not_kept_with_their_results() -> None:
    cache = make()
    tracemalloc.start()
    try:
        for number in range(8):
            assert await get(cache, f"key {number}", bytes([number]) * (4 << 20), Work()) == "done"
        held_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert cache.kept == 8
    assert held_bytes < 1 << 20
