"""Scores many items: batches of bounded size, bounded concurrency, failures tried again and never made a number."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from perigee.buffer.v1 import buffer_pb2
from perigee.errors import (
    AbortedError,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from perigee.reward.v1 import reward_pb2 as pb

# A message stays below the 4 MiB that a channel takes.
MAX_BATCH_BYTES = 3 << 20
# The service is away or busy: the items are not at fault, and the call is made again until `outage_s` have passed.
AWAY = (UnavailableError, ResourceExhaustedError)
# A call that ended badly may be an item's doing: it counts as an attempt of every item without an outcome.
BROKEN = (DeadlineExceededError, InternalError, AbortedError)
_VIOLATED_ITEM = re.compile(r"items\[(\d+)\]\.?(.*)", re.DOTALL)


class Scores(Protocol):
    """What gives outcomes: `perigee.reward.client.RewardClient` for one."""

    def score(self, request: pb.ScoreRequest, *, timeout_s: float) -> AsyncIterator[pb.ScoreResponse]: ...


@dataclass(frozen=True)
class BatchOptions:
    """How many items at once, and how long to try."""

    batch: int = 64
    """Items per call."""
    concurrency: int = 4
    """Calls at once."""
    attempts: int = 3
    """Times that an item is tried while its outcome is FAILED and retryable."""
    call_timeout_s: float = 600.0
    """Deadline of one call."""
    outage_s: float = 60.0
    """How long the service may be away before that is an error."""
    first_pause_s: float = 0.5
    """Pause before failed items are tried again; it doubles."""
    last_pause_s: float = 30.0
    """Longest pause."""


@dataclass
class _Health:
    """Since when the service is away; None while it answers."""

    away_since: float | None = None

    def note_away(self, outage_s: float) -> bool:
        """Whether the service is away for longer than `outage_s`."""
        now = time.monotonic()
        if self.away_since is None:
            self.away_since = now
        return now - self.away_since > outage_s


async def score_items(
    client: Scores, items: Sequence[pb.ScoreItem], options: BatchOptions = BatchOptions()
) -> AsyncGenerator[pb.ScoreResponse, None]:
    """One final outcome per item, in the order in which they become known; the items' ids must differ.

    An item that the service refuses is FAILED and not retryable, with the field and why in its reason.

    Raises UnavailableError or ResourceExhaustedError when the service was not heard for `outage_s`, and what a call
    raises that no other attempt can change.
    """
    left = list(items)
    health = _Health()
    pause_s = options.first_pause_s
    for attempt in range(1, options.attempts + 1):
        again: list[pb.ScoreItem] = []
        hint_s = 0.0
        async with aclosing(_score_once(client, left, options, health)) as outcomes:
            async for item, response in outcomes:
                if attempt < options.attempts and is_passing(response):
                    again.append(item)
                    hint_s = max(hint_s, response.retry_after_ms / 1000)
                else:
                    yield response
        if not again:
            return
        await asyncio.sleep(min(max(pause_s, hint_s), options.last_pause_s))
        pause_s *= 2
        left = again


def is_passing(response: pb.ScoreResponse) -> bool:
    """Whether the outcome is a failure that may pass."""
    return response.verdict == buffer_pb2.VERDICT_FAILED and response.retryable


def make_batches(items: Iterable[pb.ScoreItem], size: int) -> Iterator[list[pb.ScoreItem]]:
    """The items in order, at most `size` and about MAX_BATCH_BYTES at once."""
    batch: list[pb.ScoreItem] = []
    total = 0
    for item in items:
        item_bytes = item.ByteSize()
        if batch and (len(batch) == size or total + item_bytes > MAX_BATCH_BYTES):
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += item_bytes
    if batch:
        yield batch


_Pair = tuple[pb.ScoreItem, pb.ScoreResponse]


async def _score_once(
    client: Scores, items: Sequence[pb.ScoreItem], options: BatchOptions, health: _Health
) -> AsyncGenerator[_Pair, None]:
    """One outcome per item, passing failures included."""
    batches = make_batches(items, options.batch)
    # Unbounded in type only: one entry an item, and the items are there already.
    done: asyncio.Queue[_Pair | None] = asyncio.Queue()

    async def work() -> None:
        for batch in batches:  # shared: each batch is one worker's
            async with aclosing(_score_batch(client, batch, options, health)) as outcomes:
                async for pair in outcomes:
                    done.put_nowait(pair)

    async def work_all() -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(options.concurrency):
                    tasks.create_task(work())
        finally:
            done.put_nowait(None)

    task = asyncio.create_task(work_all())
    try:
        while (pair := await done.get()) is not None:
            yield pair
        await task
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from group
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _score_batch(
    client: Scores, batch: Sequence[pb.ScoreItem], options: BatchOptions, health: _Health
) -> AsyncGenerator[_Pair, None]:
    """The outcomes of one batch; asks again for those that a call left out, as long as the service is away."""
    waiting = {item.id: item for item in batch}
    for item in batch:
        if (size := item.ByteSize()) > MAX_BATCH_BYTES:
            del waiting[item.id]
            yield item, failed(item, f"the item has {size} bytes, more than {MAX_BATCH_BYTES}", retryable=False)
    pause_s = options.first_pause_s
    while waiting:
        asked = list(waiting.values())
        try:
            async for response in client.score(pb.ScoreRequest(items=asked), timeout_s=options.call_timeout_s):
                health.away_since = None
                if response.id in waiting:
                    yield waiting.pop(response.id), response
            reason = "the reward service gave no outcome"
        except AWAY as error:
            if health.note_away(options.outage_s):
                raise
            await asyncio.sleep(min(max(pause_s, error.retry_after_s or 0.0), options.last_pause_s))
            pause_s *= 2
            continue
        except BROKEN as error:
            reason = error.message
        except InvalidArgumentError as error:
            health.away_since = None
            refusals = read_refusals(error, asked)
            for item, refusal in refusals:
                del waiting[item.id]
                yield item, refusal
            if refusals:
                continue
            # The refusal names no item: each is asked about alone.
            for item in asked:
                async with aclosing(_score_batch(client, [item], options, health)) as outcomes:
                    async for pair in outcomes:
                        yield pair
            return
        for item in waiting.values():
            yield item, failed(item, reason, retryable=True)
        return


def read_refusals(error: InvalidArgumentError, items: Sequence[pb.ScoreItem]) -> list[_Pair]:
    """The items that a refused call names, each FAILED; a single item when it names none."""
    reasons: dict[int, list[str]] = {}
    for violation in error.violations:
        match = _VIOLATED_ITEM.fullmatch(violation.field)
        if match is not None and int(match[1]) < len(items):
            place = f"{match[2]}: " if match[2] else ""
            reasons.setdefault(int(match[1]), []).append(place + violation.description)
    if not reasons and len(items) == 1:
        return [(items[0], failed(items[0], f"refused: {error.message}", retryable=False))]
    return [
        (items[index], failed(items[index], f"refused: {'; '.join(found)}", retryable=False))
        for index, found in reasons.items()
    ]


def failed(item: pb.ScoreItem, reason: str, *, retryable: bool) -> pb.ScoreResponse:
    """The outcome of an item that nobody judged."""
    return pb.ScoreResponse(
        id=item.id,
        verdict=buffer_pb2.VERDICT_FAILED,
        reason=reason,
        retryable=retryable,
        verifier=item.WhichOneof("verifier") or "",
    )
