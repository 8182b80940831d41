"""Scores responses: batches of bounded size and number, failures tried again, one verdict for every response.

A response that makes its call fail is found by halving the batch. It FAILS alone, after as many attempts as any other
failure has, and its neighbours get their verdicts. Only a service that is out of reach for too long ends the scoring.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from perigee.buffer.v1 import buffer_pb2
from perigee.errors import (
    UNAVAILABLE,
    InvalidArgumentError,
    PerigeeError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
    first_error,
)
from perigee.image_sources import ImageStore
from perigee.images import ImageInfo
from perigee.reward.v1 import reward_pb2 as pb

# A message stays below the 4 MiB that a channel takes.
MAX_BATCH_BYTES = 3 << 20
# Neither another response nor another attempt changes these.
FATAL = (UnauthenticatedError, PermissionDeniedError, UnimplementedError)
_VIOLATED_ITEM = re.compile(r"items\[(\d+)\]\.?(.*)", re.DOTALL)

Sink = Callable[[list[pb.ScoreResponse]], Awaitable[None]]


class RewardLostError(UnavailableError):
    """The reward service was out of reach for as long as the options allow."""


class _SinkError(Exception):
    """An outcome could not be handed over, for the reason that is its cause."""


class ScoreClient(Protocol):
    """Anything that scores like `perigee.reward.client.RewardClient`."""

    def score(self, request: pb.ScoreRequest, *, timeout_s: float) -> AsyncIterator[pb.ScoreResponse]: ...


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """Sizes, numbers and times of the calls."""

    batch: int = 64
    """Responses per call."""
    concurrency: int = 4
    """Calls at once."""
    attempts: int = 3
    """Times that a response is tried while it fails in a way that may pass."""
    call_timeout_s: float = 600.0
    """Deadline of one call, beside what its responses add."""
    mib_timeout_s: float = 60.0
    """Seconds that a MiB of items adds to the deadline of their call."""
    unavailable_s: float = 60.0
    """How long the service may be out of reach before that is an error."""
    first_pause_s: float = 0.5
    """Pause before the second attempt; it doubles."""
    last_pause_s: float = 30.0
    """Longest pause."""
    max_pending: int = 4096
    """Responses without an outcome; `submit` waits while there are more."""
    max_pending_bytes: int = 64 << 20
    """Bytes of the responses without an outcome, beyond which `submit` waits, too; one may be larger by itself."""
    report_s: float = 0.0
    """Least time between two reports of one call, but for its last."""
    around_call: Callable[[int], AbstractContextManager[object]] = nullcontext
    """Entered with the number of responses around each call; for traces."""


@dataclass(slots=True, eq=False)
class ScoreJob:
    """A response to score. `item` holds all but id, response and images, and may be shared by many jobs."""

    id: str
    response: str
    item: pb.ScoreItem
    # Images beside those of the item; they are read for each call, and not held meanwhile.
    images: Sequence[ImageInfo] = ()
    store: ImageStore | None = None
    # Bytes of a response that is not here, since no message would hold it.
    left_out_bytes: int = 0
    attempts: int = 0
    # Start of its first call since which nothing came back; None when it was not postponed.
    postponed_since: float | None = None
    _size: int = field(default=0, repr=False)
    _response_bytes: int = field(default=-1, repr=False)

    @property
    def size(self) -> int:
        """Bytes of its item in a message."""
        if not self._size:
            # The template may hold the response already.
            own = 0 if self.item.response else len(self.id) + self.response_bytes
            self._size = self.item.ByteSize() + own + sum(image.size_bytes for image in self.images)
        return self._size

    @property
    def response_bytes(self) -> int:
        """Bytes of its response in UTF-8."""
        if self._response_bytes < 0:
            self._response_bytes = self.left_out_bytes + len(self.response.encode(errors="replace"))
        return self._response_bytes

    @property
    def why_too_large(self) -> str:
        """Why no message holds it."""
        images = "".join(f", {image.size_bytes} of them of image {image.digest}" for image in self.images)
        return f"the item has {self.size} bytes, more than {MAX_BATCH_BYTES}{images}"

    def write(self, item: pb.ScoreItem) -> None:
        """Fills an item of a request; raises DataLossError for an image that cannot be read."""
        item.CopyFrom(self.item)
        item.id, item.response = self.id, self.response
        for image in self.images:
            assert self.store is not None
            item.images.add(data=self.store.read(image).data)


def failed(job: ScoreJob, reason: str, *, retryable: bool) -> pb.ScoreResponse:
    """Returns the outcome of a response that was not judged."""
    return pb.ScoreResponse(
        id=job.id,
        verdict=buffer_pb2.VERDICT_FAILED,
        reason=reason,
        retryable=retryable,
        verifier=job.item.WhichOneof("verifier") or "",
    )


def read_reward(outcome: pb.ScoreResponse) -> float | None:
    """Returns the reward; None when the verdict is FAILED."""
    return outcome.reward if outcome.HasField("reward") else None


@asynccontextmanager
async def scoring(client: ScoreClient, options: ScoringOptions, sink: Sink) -> AsyncIterator[ScoringPipeline]:
    """Opens a pipeline that hands outcomes to `sink`; leaving the block without an error waits for all of them.

    Raises RewardLostError when the service was out of reach for `unavailable_s`, an error of authorization as it comes,
    and what `sink` raises; the block is cancelled then.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            pipeline = ScoringPipeline(client, options, sink, tasks)
            workers = [tasks.create_task(pipeline.work()) for _ in range(options.concurrency)]
            yield pipeline
            await pipeline.drain()
            for worker in workers:
                worker.cancel()
    except BaseExceptionGroup as group:
        error = first_error(group)
        # What a sink raises must not pass for an error of the call that it reports on.
        raise (error.__cause__ or error if isinstance(error, _SinkError) else error) from group


async def score_items(
    client: ScoreClient, items: Sequence[pb.ScoreItem], options: ScoringOptions = ScoringOptions()
) -> AsyncGenerator[pb.ScoreResponse, None]:
    """Yields one final outcome per item, in the order in which they become known; the items' ids must differ.

    Raises InvalidArgumentError when two items have the same id, and what `scoring` raises.
    """
    if len({item.id for item in items}) < len(items):
        raise InvalidArgumentError.for_field("id", "must differ from item to item: outcomes are told apart by it")
    # Unbounded in type only: one entry an item, and the items are there already.
    outcomes: asyncio.Queue[pb.ScoreResponse | None] = asyncio.Queue()

    async def take(some: list[pb.ScoreResponse]) -> None:
        for outcome in some:
            outcomes.put_nowait(outcome)

    async def score() -> None:
        try:
            async with scoring(client, options, take) as pipeline:
                for item in items:
                    await pipeline.submit(ScoreJob(item.id, item.response, item))
        finally:
            outcomes.put_nowait(None)

    task = asyncio.create_task(score())
    try:
        while (outcome := await outcomes.get()) is not None:
            yield outcome
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class ScoringPipeline:
    """Jobs on their way to an outcome; opened by `scoring`."""

    def __init__(self, client: ScoreClient, options: ScoringOptions, sink: Sink, tasks: asyncio.TaskGroup) -> None:
        self._client = client
        self._options = options
        self._sink = sink
        self._tasks = tasks
        self._calls = asyncio.Semaphore(options.concurrency)
        # Bytes of the response of each job without an outcome, and of all of them.
        self._pending: dict[str, int] = {}
        self._pending_bytes = 0
        self._room = asyncio.Condition()
        self._idle = asyncio.Event()
        self._idle.set()
        self._waiting: deque[ScoreJob] = deque()
        self._arrived = asyncio.Event()
        self._answered_at = -1.0
        self._unavailable_since: float | None = None

    async def submit(self, job: ScoreJob) -> None:
        """Takes a job; waits while `max_pending` of them, or of `max_pending_bytes` together, have no outcome yet.

        Raises InvalidArgumentError when a job with the same id has none yet: outcomes are told apart by it.
        """
        # What is left out takes no room, nor does its size wait for any.
        size = 0 if job.left_out_bytes else job.response_bytes
        async with self._room:
            await self._room.wait_for(lambda: self._has_room(size))
            if job.id in self._pending:
                raise InvalidArgumentError.for_field("id", f"{job.id!r} is being scored already")
            self._pending[job.id] = size
            self._pending_bytes += size
        self._idle.clear()
        if job.size > MAX_BATCH_BYTES:
            self._tasks.create_task(self._report([failed(job, job.why_too_large, retryable=False)]))
            return
        self._waiting.append(job)
        self._arrived.set()

    def _has_room(self, size: int) -> bool:
        options = self._options
        fits = self._pending_bytes + size <= options.max_pending_bytes or not self._pending
        return fits and len(self._pending) < options.max_pending

    async def drain(self) -> None:
        """Waits until every job has its outcome."""
        await self._idle.wait()

    async def work(self) -> None:
        """Scores batches of what is submitted, until cancelled."""
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            await self._score(self._take_batch())

    def _take_batch(self) -> list[ScoreJob]:
        """Takes submitted jobs for one call, in order."""
        batch = [self._waiting.popleft()]
        size = batch[0].size
        while self._waiting and len(batch) < self._options.batch and size + self._waiting[0].size <= MAX_BATCH_BYTES:
            batch.append(self._waiting.popleft())
            size += batch[-1].size
        return batch

    async def _score(self, jobs: list[ScoreJob]) -> None:
        """Makes one call; what it leaves without an outcome is called again by tasks of its own."""
        async with self._calls:
            with self._options.around_call(len(jobs)):
                call = await self._call(jobs)
        for some, pause_s in call.plan_retries():
            self._tasks.create_task(self._score_later(some, pause_s))

    async def _score_later(self, jobs: list[ScoreJob], pause_s: float) -> None:
        """Scores after a pause."""
        await asyncio.sleep(pause_s)
        await self._score(jobs)

    async def _call(self, jobs: list[ScoreJob]) -> _Call:
        """Makes one call and reports its final outcomes; the result says what to call again."""
        call = _Call(jobs, self._options)
        try:
            if call.is_postponed:
                call.pinged_at = await self._ping()
            async for response in self._client.score(call.build_request(), timeout_s=call.timeout_s):
                self._note_answer()
                call.receive(response)
                if call.finals and time.monotonic() - call.reported_at >= self._options.report_s:
                    await self._report(call.take_finals())
            self._note_answer()
            call.fail_unanswered("the reward service gave no outcome")
        except FATAL:
            raise
        except UNAVAILABLE as error:
            # It was in reach meanwhile: these may be what it dies of. That it is full says nothing of them.
            was_full = isinstance(error, ResourceExhaustedError)
            if self._answered_at > call.since or (call.pinged_at > call.since and not was_full):
                self._unavailable_since = None
                call.split_unanswered(error)
            else:
                call.postpone_unanswered(self._pause_of_outage(error))
        except InvalidArgumentError as error:
            self._note_answer()
            call.refuse(error)
        except PerigeeError as error:
            call.split_unanswered(error)
        await self._report(call.take_finals())
        return call

    async def _ping(self) -> float:
        """Returns when the service answered a call without items."""
        async for _ in self._client.score(pb.ScoreRequest(), timeout_s=self._options.call_timeout_s):
            pass
        return time.monotonic()

    def _note_answer(self) -> None:
        """Notes that the service is in reach."""
        self._answered_at = time.monotonic()
        self._unavailable_since = None

    def _pause_of_outage(self, error: PerigeeError) -> float:
        """Returns how long to wait for the service: as long as it is out of reach already, within bounds.

        Raises RewardLostError when that is for more than `unavailable_s`.
        """
        now = time.monotonic()
        if self._unavailable_since is None:
            self._unavailable_since = now
        outage_s = now - self._unavailable_since
        if outage_s > self._options.unavailable_s:
            limit_s = self._options.unavailable_s
            raise RewardLostError(f"Responses could not be scored for {limit_s:g} s: {error.message}") from error
        pause_s = max(self._options.first_pause_s, outage_s, error.retry_after_s or 0.0)
        return min(pause_s, self._options.last_pause_s)

    async def _report(self, outcomes: list[pb.ScoreResponse]) -> None:
        """Hands outcomes over and makes room for as many jobs."""
        if not outcomes:
            return
        try:
            await self._sink(outcomes)
        except Exception as error:
            raise _SinkError from error
        for outcome in outcomes:
            self._pending_bytes -= self._pending.pop(outcome.id)
        async with self._room:
            self._room.notify_all()
        if not self._pending:
            self._idle.set()


class _Call:
    """One call's jobs: which of them have an outcome, and which to call again, together with which others and when."""

    def __init__(self, jobs: Sequence[ScoreJob], options: ScoringOptions) -> None:
        now = time.monotonic()
        self.is_postponed = any(job.postponed_since for job in jobs)
        self.since = min(job.postponed_since or now for job in jobs)
        self.pinged_at = -1.0
        self.reported_at = -1.0
        self.finals: list[pb.ScoreResponse] = []
        self._splits: list[tuple[list[ScoreJob], float]] = []
        self._again: list[ScoreJob] = []
        self._pause_s = 0.0
        self._options = options
        self.timeout_s = options.call_timeout_s + options.mib_timeout_s * sum(job.size for job in jobs) / (1 << 20)
        self._asked = list(jobs)
        self._unanswered = {job.id: job for job in jobs}

    def build_request(self) -> pb.ScoreRequest:
        """Returns the call's message."""
        request = pb.ScoreRequest()
        for job in self._asked:
            job.write(request.items.add())
        return request

    def receive(self, response: pb.ScoreResponse) -> None:
        """Takes an outcome; a failure that may pass is tried again while attempts are left."""
        if (job := self._unanswered.pop(response.id, None)) is None:
            return
        if response.verdict == buffer_pb2.VERDICT_FAILED and response.retryable:
            self._fail(job, response)
        else:
            self.finals.append(response)

    def fail_unanswered(self, reason: str) -> None:
        """Counts an attempt of every job without an outcome."""
        for job in self._take_unanswered():
            self._fail(job, failed(job, reason, retryable=True))

    def split_unanswered(self, error: PerigeeError) -> None:
        """Has the jobs without an outcome called in halves; one that is alone has used an attempt."""
        if len(self._unanswered) <= 1:
            self.fail_unanswered(error.message)
            return
        jobs = self._take_unanswered()
        middle = len(jobs) // 2
        self._splits += [(half, self._options.first_pause_s) for half in (jobs[:middle], jobs[middle:])]

    def postpone_unanswered(self, pause_s: float) -> None:
        """Has the jobs without an outcome called again as they are."""
        jobs = self._take_unanswered()
        for job in jobs:
            job.postponed_since = self.since
        self._splits.append((jobs, pause_s))

    def refuse(self, error: InvalidArgumentError) -> None:
        """Fails the jobs that a refusal names; where it names none, has halves called."""
        reasons: dict[str, list[str]] = {}
        for violation in error.violations:
            match = _VIOLATED_ITEM.fullmatch(violation.field)
            if match is not None and int(match[1]) < len(self._asked):
                place = f"{match[2]}: " if match[2] else ""
                reasons.setdefault(self._asked[int(match[1])].id, []).append(place + violation.description)
        if not reasons and len(self._unanswered) == 1:
            reasons = {job_id: [error.message] for job_id in self._unanswered}
        named = [self._unanswered.pop(job_id) for job_id in reasons if job_id in self._unanswered]
        self.finals += [failed(job, f"refused: {'; '.join(reasons[job.id])}", retryable=False) for job in named]
        if not named:
            self.split_unanswered(error)
        elif self._unanswered:
            self._splits.append((self._take_unanswered(), 0.0))

    def plan_retries(self) -> list[tuple[list[ScoreJob], float]]:
        """Returns what to call again, and after how long."""
        return [*self._splits, (self._again, self._pause_s)] if self._again else self._splits

    def take_finals(self) -> list[pb.ScoreResponse]:
        """Returns the outcomes that were not reported yet."""
        finals, self.finals = self.finals, []
        self.reported_at = time.monotonic()
        return finals

    def _take_unanswered(self) -> list[ScoreJob]:
        """Takes the jobs without an outcome."""
        jobs = list(self._unanswered.values())
        self._unanswered.clear()
        for job in jobs:
            job.postponed_since = None
        return jobs

    def _fail(self, job: ScoreJob, outcome: pb.ScoreResponse) -> None:
        """Counts an attempt: the job is tried again after a pause that doubles, or its outcome is final."""
        job.attempts += 1
        if job.attempts >= self._options.attempts:
            self.finals.append(outcome)
            return
        pause_s = self._options.first_pause_s * 2 ** min(job.attempts - 1, 30)
        self._again.append(job)
        self._pause_s = min(max(self._pause_s, pause_s, outcome.retry_after_ms / 1000), self._options.last_pause_s)
