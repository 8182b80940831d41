"""The single-flight cache; the sandbox's and the reward service's tests show it at work."""

from __future__ import annotations

import asyncio

import pytest

from perigee.errors import InvalidArgumentError, UnavailableError
from services.kit.single_flight import SingleFlightCache


class Work:
    """Work that waits to be let go, and counts how often it began and was cancelled."""

    def __init__(self) -> None:
        self.begun = self.cancelled = 0
        self.go = asyncio.Event()

    async def __call__(self) -> str:
        self.begun += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return f"result {self.begun}"


async def test_work_runs_once_for_all_who_ask() -> None:
    work, cache = Work(), SingleFlightCache[str, str](4)
    first, second = (asyncio.create_task(cache.get("k", work)) for _ in range(2))
    await asyncio.sleep(0)
    work.go.set()
    assert [await first, await second] == [("result 1", False), ("result 1", True)]
    assert await cache.get("k", work) == ("result 1", True)
    assert (work.begun, cache.kept) == (1, 1)


async def test_work_is_cancelled_when_the_last_caller_has_gone() -> None:
    work, cache = Work(), SingleFlightCache[str, str](4)
    callers = [asyncio.create_task(cache.get("k", work)) for _ in range(2)]
    await asyncio.sleep(0)
    for caller, cancelled in zip(callers, (0, 1), strict=True):
        await asyncio.sleep(0)
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)
        assert work.cancelled == cancelled
    assert cache.kept == 0


async def test_errors_and_results_that_are_not_final_are_not_kept() -> None:
    cache = SingleFlightCache[str, int](4, is_final=lambda result: result > 0)

    async def fail() -> int:
        raise ZeroDivisionError

    async def refused() -> int:
        return 0

    with pytest.raises(ZeroDivisionError):
        await cache.get("k", fail)
    assert await cache.get("k", refused) == (0, False)
    assert await cache.get("k", refused) == (0, False)


async def test_the_least_recently_used_goes_first_and_all_expire() -> None:
    now = 0.0
    cache = SingleFlightCache[str, str](2, total_bytes=10, ttl_s=5, size_of=len, clock=lambda: now)

    async def value(text: str) -> str:
        return text

    for key in ("a", "b", "a", "c"):
        await cache.get(key, lambda key=key: value(key * 3))  # type: ignore[misc]
    assert (await cache.get("a", lambda: value("new")))[1]
    assert not (await cache.get("b", lambda: value("new")))[1]
    assert (await cache.get("too large", lambda: value("x" * 11)))[1] is False
    assert cache.kept_bytes == 6
    now = 6.0
    assert not (await cache.get("a", lambda: value("new")))[1]
    assert cache.kept == 1


async def test_a_key_stands_for_one_request() -> None:
    work, cache = Work(), SingleFlightCache[str, str](4, key_field="idempotency_key")
    work.go.set()
    await cache.get("k", work, b"one")
    with pytest.raises(InvalidArgumentError, match="idempotency_key: was used for another request"):
        await cache.get("k", work, b"other")


async def test_closing_ends_what_runs() -> None:
    work, cache = Work(), SingleFlightCache[str, str](4)
    caller = asyncio.create_task(cache.get("k", work))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await cache.close()
    with pytest.raises(UnavailableError, match="stopping"):
        await caller
    assert work.cancelled == 1
