"""The job queue, as callers see it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from perigee.errors import ResourceExhaustedError
from perigee.sandbox.v1 import sandbox_pb2 as pb
from tests.fixtures.sandbox import stdio_tests
from tests.fixtures.sandbox_fronts import Fronts, running_fronts

HELLO = pb.ExecuteRequest(language="python", source=b"print('hello')")
SLEEPER = pb.ExecuteRequest(
    language="python",
    source=b"import time\nprint('awake', flush=True)\ntime.sleep(100)",
    limits=pb.Limits(wall_ms=110_000),
)


@asynccontextmanager
async def occupied_slot(fronts: Fronts) -> AsyncIterator[None]:
    """The only slot is taken for as long as the block lasts."""
    events = aiter(fronts.grpc.execute_stream(SLEEPER))
    first = await anext(events)
    assert first.stdout == b"awake\n"
    try:
        yield
    finally:
        await events.aclose()  # type: ignore[attr-defined]


async def wait_for_queue(fronts: Fronts, length: int) -> None:
    """Returns when so many jobs wait."""
    async with asyncio.timeout(60):
        # the queue is in the service, and its metrics set no event
        while f"\nperigee_sandbox_waiting_jobs {length}.0" not in (await fronts.http.get("/metrics")).text:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_full_queue_refuses_with_a_hint(tmp_path: Path) -> None:
    async with running_fronts(tmp_path, slots=1, queue_limit=2, max_sessions=0) as fronts:
        async with occupied_slot(fronts):
            waiting = [asyncio.create_task(fronts.grpc.execute(HELLO)) for _ in range(2)]
            await wait_for_queue(fronts, 2)
            with pytest.raises(ResourceExhaustedError) as refused:
                await fronts.grpc.execute(HELLO)
            assert refused.value.retry_after_s
            body = {"language": "python", "source": "print(1)"}
            response = await fronts.http.post("/v1/execute", json=body)
            assert (response.status_code, response.json()["error"]["code"]) == (429, "RESOURCE_EXHAUSTED")
            assert response.json()["error"]["retry_after_s"] > 0
            assert int(response.headers["retry-after"]) >= 1
        assert [response.stdout for response in await asyncio.gather(*waiting)] == [b"hello\n"] * 2
        assert (await fronts.http.post("/v1/execute", json=body)).json()["stdout"] == "1\n"


async def test_the_queue_is_as_long_as_configured(tmp_path: Path) -> None:
    async with running_fronts(tmp_path, slots=1, max_sessions=0) as fronts, occupied_slot(fronts):
        waiting = [asyncio.create_task(fronts.grpc.execute(HELLO)) for _ in range(400)]
        await wait_for_queue(fronts, 400)
        for call in waiting:
            call.cancel()
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ended), ended
        await wait_for_queue(fronts, 0)


async def test_a_caller_without_the_time_to_wait_is_refused_at_once(tmp_path: Path) -> None:
    """A lease takes about four seconds, as the queue has measured."""
    async with running_fronts(tmp_path, slots=1, max_sessions=0) as fronts:
        slow = pb.ExecuteRequest(language="python", source=b"import time\ntime.sleep(4)")
        await fronts.grpc.execute(slow)
        async with occupied_slot(fronts):
            with pytest.raises(ResourceExhaustedError, match=r"longer than the .* left") as refused:
                await fronts.grpc.execute(HELLO, timeout_s=3.9)
            assert refused.value.retry_after_s
            headers = {"X-Timeout-Seconds": "3.9"}
            body = {"language": "python", "source": "print(1)"}
            response = await fronts.http.post("/v1/execute", json=body, headers=headers)
            assert response.status_code == 429


async def test_no_job_waits_longer_than_the_service_allows(tmp_path: Path) -> None:
    async with running_fronts(tmp_path, slots=1, queue_seconds=0.5, max_sessions=0) as fronts, occupied_slot(fronts):
        with pytest.raises(ResourceExhaustedError, match="no slot was free"):
            await fronts.grpc.execute(HELLO)


async def test_a_small_job_goes_before_large_ones(tmp_path: Path) -> None:
    async with running_fronts(tmp_path, slots=1, priority_window_seconds=60, max_sessions=0) as fronts:
        ended: list[str] = []

        async def note(name: str, call: Awaitable[object]) -> None:
            await call
            ended.append(name)

        large = pb.JudgeRequest(language="python", source=b"print(1)", tests=stdio_tests([(b"", b"1")] * 20))
        small = pb.ExecuteRequest(language="python", source=b"print(1)", limits=pb.Limits(wall_ms=1000))
        async with asyncio.TaskGroup() as group, occupied_slot(fronts):
            for number in range(3):
                group.create_task(note("large", fronts.grpc.judge(large)))
                await wait_for_queue(fronts, number + 1)
            group.create_task(note("small", fronts.grpc.execute(small)))
            await wait_for_queue(fronts, 4)
        assert ended == ["small", "large", "large", "large"]
