"""The same key with the same request runs once."""

from __future__ import annotations

import asyncio
import random
import tracemalloc
from typing import Any

import pytest

from perigee.errors import InvalidArgumentError, UnavailableError
from services.sandbox.idempotency import Once


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


def make(**bounds: Any) -> Once[str]:
    settings = {"entries": 10, "total_bytes": 100, "ttl_s": 60.0, "size_of": len, **bounds}
    return Once(**settings)


async def begin(once: Once[str], key: str, work: Work, digest: bytes = b"a") -> asyncio.Task[str]:
    """A call's task, once it waits."""
    task = asyncio.create_task(once.get(key, digest, work))
    for _ in range(3):
        await asyncio.sleep(0)
    return task


async def test_the_first_result_is_everybody_s() -> None:
    once, work, other = make(), Work("first"), Work("second")
    assert await once.get("k", b"a", work) == "first"
    assert await once.get("k", b"a", other) == "first"
    assert await once.get("l", b"a", other) == "second"
    assert (work.runs, other.runs) == (1, 1)


async def test_without_a_key_each_call_runs() -> None:
    once, work = make(), Work()
    assert [await once.get("", b"a", work), await once.get("", b"b", work)] == ["done", "done"]
    assert (work.runs, once.kept) == (2, 0)


async def test_calls_at_the_same_time_join() -> None:
    once, work = make(), Work(waits=True)
    tasks = [await begin(once, "k", work) for _ in range(5)]
    work.gate.set()
    assert await asyncio.gather(*tasks) == ["done"] * 5
    assert work.runs == 1


async def test_the_same_key_for_another_request_is_refused() -> None:
    once, work = make(), Work(waits=True)
    running = await begin(once, "k", work)
    for _ in range(2):  # while it runs, and afterwards
        with pytest.raises(InvalidArgumentError, match="used for another request") as error:
            await once.get("k", b"b", Work())
        assert [violation.field for violation in error.value.violations] == ["idempotency_key"]
        work.gate.set()
        assert await running == "done"


async def test_work_goes_on_while_somebody_waits() -> None:
    once, work = make(), Work(waits=True)
    first, second = await begin(once, "k", work), await begin(once, "k", work)
    first.cancel()
    await asyncio.wait({first})
    assert first.cancelled()
    assert work.cancelled == 0
    work.gate.set()
    assert await second == "done"


async def test_work_ends_with_the_last_who_waits_and_has_ended_then() -> None:
    once, work = make(), Work(waits=True)
    tasks = [await begin(once, "k", work) for _ in range(3)]
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert (work.cancelled, work.cleaned_up) == (1, 1)
    again = Work("again")
    assert await once.get("k", b"b", again) == "again"


async def test_who_comes_while_abandoned_work_ends_starts_anew() -> None:
    once, work, again = make(), Work(waits=True), Work("again")
    abandoned = await begin(once, "k", work)
    abandoned.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (work.cancelled, work.cleaned_up) == (1, 0)
    assert await once.get("k", b"a", again) == "again"
    assert abandoned.cancelled()
    assert await once.get("k", b"a", work) == "again"


async def test_a_result_is_kept_though_its_last_caller_left_just_then() -> None:
    once, work = make(), Work(waits=True)
    task = await begin(once, "k", work)
    work.gate.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert await once.get("k", b"a", work) == "done"
    assert work.runs == 1


async def test_failures_are_not_kept() -> None:
    once = make(is_final=lambda result: result != "infra")
    failing, infra, fine = Work(ValueError("broken")), Work("infra"), Work("fine")
    joined = [asyncio.create_task(once.get("k", b"a", failing)) for _ in range(2)]
    errors = await asyncio.gather(*joined, return_exceptions=True)
    assert [str(error) for error in errors] == ["broken", "broken"]
    assert failing.runs == 1
    assert await once.get("k", b"other", infra) == "infra"
    assert await once.get("k", b"a", fine) == "fine"
    assert once.kept == 1


async def test_results_live_for_their_time_however_often_they_are_used() -> None:
    clock = Clock()
    once, work = make(clock=clock, ttl_s=60.0), Work()
    await once.get("k", b"a", work)
    clock.now += 30
    await once.get("l", b"a", work)
    clock.now += 29
    await once.get("k", b"a", work)
    assert work.runs == 2
    clock.now += 1
    await once.get("m", b"a", work)
    assert (work.runs, once.kept) == (3, 2)
    await once.get("k", b"b", work)
    assert work.runs == 4


async def test_results_are_bounded_in_number_and_the_oldest_use_goes_first() -> None:
    once, work = make(entries=2), Work()
    for key in ("1", "2", "1", "3", "1", "2"):  # 2 goes for 3
        await once.get(key, b"a", work)
    assert (work.runs, once.kept) == (4, 2)


async def test_results_are_bounded_in_size() -> None:
    once = make(total_bytes=10)
    for key, size in (("1", 4), ("2", 4), ("3", 4), ("large", 11)):
        await once.get(key, b"a", Work("x" * size))
    assert (once.kept, once.kept_bytes) == (2, 8)
    again = Work("again")
    assert await once.get("large", b"a", again) == "again"
    assert (once.kept, once.kept_bytes) == (2, 9)


async def test_closing_ends_what_runs_and_says_so() -> None:
    once, work = make(), Work(waits=True)
    task = await begin(once, "k", work)
    await once.close()
    assert (work.cancelled, work.cleaned_up) == (1, 1)
    with pytest.raises(UnavailableError):
        await task


@pytest.mark.parametrize("seed", range(50))
async def test_whoever_stays_gets_the_result_whatever_the_others_do(seed: int) -> None:
    choose = random.Random(seed)
    once = make(entries=2)
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
        tasks.append(asyncio.create_task(once.get("k", b"a", work)))
        for task in choose.sample(tasks, min(len(tasks), choose.randrange(3))):
            task.cancel()
        for _ in range(choose.randrange(3)):
            await asyncio.sleep(0)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(result == "done" or isinstance(result, asyncio.CancelledError) for result in results)
    assert running == 0


async def test_large_requests_are_not_kept_with_their_results() -> None:
    once = make()
    tracemalloc.start()
    try:
        for number in range(8):
            assert await once.get(f"key {number}", bytes([number]) * (4 << 20), Work()) == "done"
        held_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert once.kept == 8
    assert held_bytes < 1 << 20
