"""Scores responses as they arrive: micro-batches to the reward service, failures tried again, never made a number."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from perigee.buffer.v1 import buffer_pb2
from perigee.errors import (
    AbortedError,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from perigee.reward.client import RewardClient
from perigee.reward.v1 import reward_pb2 as pb
from services.coordinator import metrics
from services.coordinator.config import ScoringConfig
from services.coordinator.groups import Verdict
from services.coordinator.prompts import Prompt
from services.coordinator.run_errors import PeerLostError
from services.coordinator.score_items import make_score_item
from services.kit.telemetry import get_logger

log = get_logger(__name__)

# Response text per call: a message stays below 4 MiB whatever its encoding.
MAX_CHARACTERS = 500_000

# The reward service is away or busy: the whole call is tried again.
PASSING = (UnavailableError, DeadlineExceededError, ResourceExhaustedError, AbortedError, InternalError)


@dataclass(slots=True)
class ScoreJob:
    """A response to judge."""

    id: str
    prompt: Prompt
    response: str
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job: a verdict with a reward, or a failure without."""

    id: str
    verdict: Verdict
    reward: float | None
    reason: str


Sink = Callable[[list[Outcome]], Awaitable[None]]


class ScoringPipeline:
    """Judges submitted responses with bounded concurrency and hands final outcomes to `sink` in batches.

    Use as a context manager: leaving the block without an error waits for every outcome.
    """

    def __init__(self, client: RewardClient, config: ScoringConfig, sink: Sink) -> None:
        self._client = client
        self._config = config
        self._sink = sink
        self._queue: asyncio.Queue[ScoreJob] = asyncio.Queue(config.queue)
        self._retries: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None
        self._available_at = time.monotonic()
        self._pending = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._workers: list[asyncio.Task[None]] = []
        self.judged = 0
        self.failed = 0
        # Seconds of calls to the reward service, all callers together.
        self.busy_seconds = 0.0

    async def __aenter__(self) -> Self:
        self._workers = [asyncio.create_task(self._work()) for _ in range(self._config.concurrency)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                await self.drain()
        finally:
            tasks = [*self._workers, *self._retries]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def submit(self, job: ScoreJob) -> None:
        """Queues a response; waits while the queue is full. Raises what the pipeline failed with."""
        self._raise_error()
        self._pending += 1
        self._idle.clear()
        try:
            await self._queue.put(job)
        except asyncio.CancelledError:
            self._count_off(1)
            raise

    async def drain(self) -> None:
        """Waits until every submitted response has its outcome. Raises what the pipeline failed with."""
        await self._idle.wait()
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    async def _work(self) -> None:
        while True:
            jobs = [await self._queue.get()]
            characters = len(jobs[0].response)
            while len(jobs) < self._config.batch and characters < MAX_CHARACTERS and not self._queue.empty():
                jobs.append(self._queue.get_nowait())
                characters += len(jobs[-1].response)
            if self._error is not None:
                continue
            started = time.monotonic()
            try:
                await self._score(jobs)
            except Exception as error:
                self._fail(error)
            self.busy_seconds += time.monotonic() - started

    async def _score(self, jobs: list[ScoreJob]) -> None:
        waiting = {job.id: job for job in jobs}
        request = pb.ScoreRequest(items=[make_score_item(job.id, job.prompt, job.response) for job in jobs])
        finals: list[Outcome] = []
        try:
            async for response in self._client.score(request, timeout_s=self._config.call_timeout_s):
                job = waiting.pop(response.id, None)
                if job is None:
                    continue
                if response.verdict == buffer_pb2.VERDICT_FAILED and response.retryable and self._may_retry(job):
                    self._retry(job)
                else:
                    finals.append(_outcome(response))
            self._available_at = time.monotonic()
            missing = "the reward service gave no outcome"
        except InvalidArgumentError as error:
            if len(jobs) > 1:
                await self._settle(finals)
                for job in waiting.values():
                    await self._score([job])
                return
            finals.append(Outcome(jobs[0].id, buffer_pb2.VERDICT_FAILED, None, error.message))
            waiting.clear()
            missing = ""
        except PASSING as error:
            if time.monotonic() - self._available_at > self._config.unavailable_s:
                raise PeerLostError(
                    f"Responses could not be scored for {self._config.unavailable_s:g} s: {error.message}"
                ) from error
            log.warning("scoring failed", responses=len(waiting), error=error.message)
            for job in waiting.values():
                self._retry(job)
            waiting.clear()
            missing = ""
        for job in waiting.values():
            if self._may_retry(job):
                self._retry(job)
            else:
                finals.append(Outcome(job.id, buffer_pb2.VERDICT_FAILED, None, missing))
        await self._settle(finals)

    def _may_retry(self, job: ScoreJob) -> bool:
        job.attempts += 1
        return job.attempts < self._config.attempts

    def _retry(self, job: ScoreJob) -> None:
        pause_s = self._config.retry_s * 2 ** min(job.attempts, 6)
        task = asyncio.create_task(self._submit_after(pause_s, job))
        self._retries.add(task)
        task.add_done_callback(self._retries.discard)

    async def _submit_after(self, pause_s: float, job: ScoreJob) -> None:
        await asyncio.sleep(pause_s)
        await self._queue.put(job)

    async def _settle(self, outcomes: list[Outcome]) -> None:
        if not outcomes:
            return
        await self._sink(outcomes)
        failed = [outcome for outcome in outcomes if outcome.verdict == buffer_pb2.VERDICT_FAILED]
        for outcome in failed:
            metrics.FAILURES.labels("judging").inc()
            log.warning("response was not judged", response=outcome.id, reason=outcome.reason)
        self.failed += len(failed)
        self.judged += len(outcomes) - len(failed)
        self._count_off(len(outcomes))

    def _count_off(self, count: int) -> None:
        self._pending -= count
        if self._pending == 0:
            self._idle.set()

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self._idle.set()


def _outcome(response: pb.ScoreResponse) -> Outcome:
    reward = response.reward if response.HasField("reward") else None
    return Outcome(response.id, response.verdict, reward, response.reason)
