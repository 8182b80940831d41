"""Scores batches: every item gets an outcome, as soon as it is known, whatever becomes of the others."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from perigee.errors import ResourceExhaustedError
from services.reward.metrics import QUEUED_ITEMS
from services.reward.panel import Judgement, Panel
from services.reward.verifiers.base import RETRY_AFTER_S, Item, Outcome, Parameters, Verifier


@dataclass(frozen=True)
class Scored:
    """An item's outcome, who judged it and how long that took."""

    item_id: str
    outcome: Outcome
    verifier: str
    version: str
    latency_ms: float


class Scorer:
    """Scores many items at once, so many of each verifier; a verifier that is behind holds up no other."""

    def __init__(self, panel: Panel, max_queued_items: int) -> None:
        self._panel = panel
        self._max_queued_items = max_queued_items
        self._queued: Counter[str] = Counter()

    @property
    def verifiers(self) -> list[Verifier[Any]]:
        """All verifiers."""
        return list(self._panel.verifiers.values())

    def verifier_of(self, parameters: Parameters) -> Verifier[Any]:
        """The verifier that takes the parameters."""
        return self._panel.verifier_of(parameters)

    async def score(self, items: Sequence[Item[Any]]) -> AsyncGenerator[Scored, None]:
        """Outcomes in the order in which they become known; leaving the iteration ends the judgements.

        Raises ResourceExhaustedError when too many items of one verifier are under way.
        """
        left = Counter(self.verifier_of(item.parameters).name for item in items)
        self._refuse_excess(left)
        self._change_queued(left, 1)
        # Unbounded in type only: one entry an item, and items are bounded above.
        done: asyncio.Queue[tuple[Item[Any], Judgement]] = asyncio.Queue()
        tasks = [asyncio.create_task(self._score_one(item, done)) for item in items]
        try:
            for _ in items:
                item, judgement = await done.get()
                name = judgement.verifier.name
                left[name] -= 1
                self._change_queued(Counter({name: 1}), -1)
                yield Scored(item.id, judgement.outcome, name, judgement.verifier.version, judgement.seconds * 1000)
        finally:
            self._change_queued(left, -1)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

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

    async def _score_one(self, item: Item[Any], done: asyncio.Queue[tuple[Item[Any], Judgement]]) -> None:
        done.put_nowait((item, await self._panel.judge(item)))
