"""Scores batches: every item gets an outcome, as soon as it is known, whatever becomes of the others.

An item is judged by the verifier of its parameters, through a cache, so that the same response to the same prompt is
judged once, whether it comes again later or at the same time.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from perigee.errors import ResourceExhaustedError
from services.kit.single_flight import SingleFlightCache
from services.kit.telemetry import get_logger
from services.kit.tracing import describe, span
from services.reward.verifiers.base import (
    CACHE_HITS,
    JUDGEMENT_SECONDS,
    OUTCOMES,
    QUEUED_ITEMS,
    RETRY_AFTER_S,
    Item,
    Outcome,
    Verdict,
    Verifier,
)

log = get_logger(__name__)


@dataclass(frozen=True)
class Scored:
    """An item's outcome, who judged it and how long that took."""

    item_id: str
    outcome: Outcome
    verifier: Verifier[Any]
    seconds: float


class Scorer:
    """Scores many items at once, so many of each verifier; a verifier that is behind holds up no other."""

    def __init__(self, cache_entries: int, max_queued_items: int) -> None:
        # By name, which is that of their message in the contract.
        self.verifiers: dict[str, Verifier[Any]] = {}
        self._cache = outcome_cache(cache_entries)
        self._max_queued_items = max_queued_items
        self._queued: Counter[str] = Counter()

    async def score(self, items: Sequence[Item[Any]]) -> AsyncGenerator[Scored, None]:
        """Yields outcomes in the order in which they become known; leaving the iteration ends the judgements.

        Raises ResourceExhaustedError when too many items of one verifier are under way.
        """
        left = Counter(item.verifier for item in items)
        self._refuse_excess(left)
        self._change_queued(left, 1)
        # Unbounded in type only: one entry an item, and items are bounded above.
        done: asyncio.Queue[Scored] = asyncio.Queue()
        tasks = [asyncio.create_task(self._score_one(item, done)) for item in items]
        try:
            for _ in items:
                scored = await done.get()
                name = scored.verifier.name
                left[name] -= 1
                self._change_queued(Counter({name: 1}), -1)
                yield scored
        finally:
            self._change_queued(left, -1)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def judge(self, item: Item[Any]) -> Scored:
        """Judges one item; a fault of its verifier is a FAILED outcome."""
        verifier = self.verifiers[item.verifier]
        begin = time.monotonic()
        with span("judge", item=item.id, verifier=verifier.name) as opened:
            try:
                outcome, is_shared = await self._cache.get(content_key(verifier, item), lambda: verifier.judge(item))
            except Exception as error:  # a fault of the verifier is this item's failure, and nobody else's
                log.exception("verifier failed", verifier=verifier.name, item_id=item.id)
                reason = f"the {verifier.name} verifier failed: {type(error).__name__}"
                outcome, is_shared = Outcome.failed(reason, retryable=False), False
            describe(opened, verdict=outcome.verdict.value, cached=is_shared)
        seconds = time.monotonic() - begin
        OUTCOMES.labels(verifier.name, outcome.verdict.value).inc()
        JUDGEMENT_SECONDS.labels(verifier.name).observe(seconds)
        if is_shared:
            CACHE_HITS.labels(verifier.name).inc()
        return Scored(item.id, outcome, verifier, seconds)

    def _refuse_excess(self, more: Counter[str]) -> None:
        for name, count in more.items():
            if self._queued[name] + count > self._max_queued_items:
                raise ResourceExhaustedError(
                    f"{self._queued[name]} items of the {name} verifier are under way and {count} more exceed "
                    f"reward.max_queued_items = {self._max_queued_items}; send them later or in smaller batches",
                    retry_after_s=RETRY_AFTER_S,
                )

    def _change_queued(self, counts: Counter[str], sign: int) -> None:
        for name, count in counts.items():
            self._queued[name] += sign * count
            QUEUED_ITEMS.labels(name).set(self._queued[name])

    async def _score_one(self, item: Item[Any], done: asyncio.Queue[Scored]) -> None:
        done.put_nowait(await self.judge(item))


def outcome_cache(entries: int) -> SingleFlightCache[bytes, Outcome]:
    """Returns a cache of outcomes by content; FAILED is not kept, since it tells nothing about the item."""
    return SingleFlightCache(entries, is_final=lambda outcome: outcome.verdict is not Verdict.FAILED)


def content_key(verifier: Verifier[Any], item: Item[Any]) -> bytes:
    """Returns a digest of all that an outcome depends on and nothing else: not the id, nor what is not looked at."""
    graded = verifier.graded_text(item)
    parts = (
        verifier.name.encode(),
        verifier.version.encode(),
        item.parameters.SerializeToString(deterministic=True),
        item.answer_marker.encode(),
        str(graded is None).encode(),
        (graded or "").encode(),
    )
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        # Lengths keep the parts apart.
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
