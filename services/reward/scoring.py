"""Scores batches: every item gets an outcome, as soon as it is known, whatever becomes of the others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perigee.errors import ResourceExhaustedError
from services.kit.telemetry import get_logger
from services.reward.cache import OutcomeCache, content_key
from services.reward.metrics import CACHE_HITS, JUDGEMENT_SECONDS, OUTCOMES, QUEUED_ITEMS
from services.reward.verifiers.base import Item, Outcome, Parameters, Verifier

log = get_logger(__name__)

RETRY_AFTER_S = 1.0


@dataclass(frozen=True)
class Scored:
    """An item's outcome, who judged it and how long that took."""

    item_id: str
    outcome: Outcome
    verifier: str
    version: str
    latency_ms: float


class Scorer:
    """Judges items with the verifier that their parameters name."""

    def __init__(
        self,
        verifiers: Mapping[type[Parameters], Verifier[Any]],
        cache: OutcomeCache,
        max_queued_items: int,
    ) -> None:
        self._verifiers = verifiers
        self._cache = cache
        self._max_queued_items = max_queued_items
        self._queued_items = 0

    @property
    def verifiers(self) -> list[Verifier[Any]]:
        """All verifiers."""
        return list(self._verifiers.values())

    def verifier_of(self, item: Item[Any]) -> Verifier[Any]:
        """The verifier that judges the item."""
        return self._verifiers[type(item.parameters)]

    async def score(self, items: Sequence[Item[Any]]) -> AsyncGenerator[Scored, None]:
        """Outcomes in the order in which they become known; leaving the iteration ends the judgements.

        Raises ResourceExhaustedError when too many items are under way.
        """
        if self._queued_items + len(items) > self._max_queued_items:
            raise ResourceExhaustedError(
                f"{self._queued_items} items are under way and {len(items)} more exceed "
                f"reward.max_queued_items = {self._max_queued_items}; send them later or in smaller batches",
                retry_after_s=RETRY_AFTER_S,
            )
        self._change_queued(len(items))
        left = len(items)
        # Unbounded in type only: one entry an item, and items are bounded above.
        done: asyncio.Queue[Scored] = asyncio.Queue()
        tasks = [asyncio.create_task(self._score_one(item, done)) for item in items]
        try:
            while left:
                scored = await done.get()
                left -= 1
                self._change_queued(-1)
                yield scored
        finally:
            self._change_queued(-left)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _change_queued(self, items: int) -> None:
        self._queued_items += items
        QUEUED_ITEMS.set(self._queued_items)

    async def _score_one(self, item: Item[Any], done: asyncio.Queue[Scored]) -> None:
        verifier = self.verifier_of(item)
        begin = time.monotonic()
        try:
            outcome, shared = await self._cache.get(content_key(verifier, item), lambda: verifier.judge(item))
        except Exception as error:  # a fault of the verifier is this item's failure, and nobody else's
            log.exception("verifier failed", verifier=verifier.name, item_id=item.id)
            outcome = Outcome.failed(f"the {verifier.name} verifier failed: {type(error).__name__}", retryable=False)
            shared = False
        seconds = time.monotonic() - begin
        OUTCOMES.labels(verifier.name, outcome.verdict.value).inc()
        JUDGEMENT_SECONDS.labels(verifier.name).observe(seconds)
        if shared:
            CACHE_HITS.labels(verifier.name).inc()
        done.put_nowait(Scored(item.id, outcome, verifier.name, verifier.version, seconds * 1000))
