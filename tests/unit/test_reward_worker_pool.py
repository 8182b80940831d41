"""Worker processes that answer, fall silent and die, with a worker that does as it is told."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from services.reward.pool.workers import WorkerDiedError, WorkerPool

# Answers after the pause that a request asks for; dies of a pause that is none.
WORKER = """
import json, sys, time
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if "cancel" in request:
        continue
    if request["pause"] is None:
        sys.exit(1)
    time.sleep(request["pause"])
    print(json.dumps({"id": request["id"], "said": request["text"]}), flush=True)
"""


@asynccontextmanager
async def running(script: str = WORKER, silence_s: float = 60.0, start_s: float = 60.0) -> AsyncIterator[WorkerPool]:
    pool = WorkerPool((sys.executable, "-c", script), 1, start_s, silence_s)
    try:
        yield pool
    finally:
        await pool.close()


async def ask(pool: WorkerPool, text: str, pause: float | None = 0.0) -> str:
    return str((await pool.ask({"text": text, "pause": pause}))["said"])


async def test_many_requests_get_their_own_answers() -> None:
    async with running() as pool:
        await pool.start()
        texts = [str(number) for number in range(50)]
        assert await asyncio.gather(*(ask(pool, text) for text in texts)) == texts


async def test_requests_of_a_worker_that_dies_fail_and_the_next_one_starts_another() -> None:
    async with running() as pool:
        both = await asyncio.gather(ask(pool, "a", None), ask(pool, "b"), return_exceptions=True)
        assert [type(error) for error in both] == [WorkerDiedError, WorkerDiedError]
        assert await ask(pool, "c") == "c"


async def test_a_worker_is_killed_when_it_owes_an_answer_for_too_long() -> None:
    async with running(silence_s=0.2) as pool:
        with pytest.raises(WorkerDiedError, match=r"did not answer within 0\.2 s"):
            await ask(pool, "a", 3600)
        pool._workers[0]._silence_s = 60.0
        assert await ask(pool, "b") == "b"


async def test_what_a_worker_had_nothing_to_do_for_is_no_silence() -> None:
    async with running() as pool:
        await ask(pool, "a")
        [worker] = pool._workers
        worker._heard -= 3600
        asking = asyncio.create_task(ask(pool, "b", 0.1))
        while not worker._pending:  # noqa: ASYNC110
            await asyncio.sleep(0)
        # As the timer does that the first question has set.
        worker._check_silence()
        assert await asking == "b"


async def test_a_caller_that_goes_away_takes_nobody_along() -> None:
    async with running() as pool:
        gone, stays = asyncio.create_task(ask(pool, "a", 0.2)), asyncio.create_task(ask(pool, "b"))
        await asyncio.sleep(0)
        gone.cancel()
        assert await stays == "b"
        assert gone.cancelled()


@pytest.mark.parametrize(
    ("script", "start_s", "reason"),
    [
        ("raise SystemExit", 60.0, "ended with exit code 0"),
        ("import time; time.sleep(60)", 0.5, r"within 0\.5 s"),
    ],
)
async def test_a_worker_that_does_not_get_ready_is_reported(script: str, start_s: float, reason: str) -> None:
    async with running(script, start_s=start_s) as pool:
        with pytest.raises(WorkerDiedError, match=reason):
            await pool.start()
