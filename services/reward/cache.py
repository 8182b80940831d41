"""Outcomes by content: the same item is judged once, whether it comes again later or at the same time."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from services.reward.verifiers.base import Item, Outcome, Verdict, Verifier


def content_key(verifier: Verifier[Any], item: Item[Any]) -> bytes:
    """Names everything that an outcome depends on and nothing else: not the id, nor what the verifier does not read."""
    digest = hashlib.blake2b(digest_size=16)
    graded = verifier.graded_text(item)
    parts = (
        verifier.name,
        verifier.version,
        repr(item.parameters),
        item.answer_marker,
        str(graded is None),
        graded or "",
    )
    for part in parts:
        data = part.encode()
        # Lengths keep the parts apart.
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()


@dataclass
class _Judging:
    task: asyncio.Task[Outcome]
    waiters: int = 0


class OutcomeCache:
    """At most `entries` outcomes, least recently used first to go.

    FAILED is never kept: it tells nothing about the item.
    """

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self._outcomes: OrderedDict[bytes, Outcome] = OrderedDict()
        self._judging: dict[bytes, _Judging] = {}

    async def get(self, key: bytes, judge: Callable[[], Awaitable[Outcome]]) -> tuple[Outcome, bool]:
        """The outcome, and whether another item's judgement gave it; judges when nobody has and nobody does.

        A judgement ends early only when all who wait for it have gone away.
        """
        if (outcome := self._outcomes.get(key)) is not None:
            self._outcomes.move_to_end(key)
            return outcome, True
        judging = self._judging.get(key)
        shared = judging is not None
        if judging is None:
            judging = self._judging[key] = _Judging(asyncio.ensure_future(_await(judge)))
        judging.waiters += 1
        try:
            outcome = await asyncio.shield(judging.task)
        finally:
            judging.waiters -= 1
            if judging.waiters == 0:
                self._judging.pop(key, None)
                if not judging.task.done():
                    judging.task.cancel()
                    await asyncio.wait({judging.task})
        self._keep(key, outcome)
        return outcome, shared

    def _keep(self, key: bytes, outcome: Outcome) -> None:
        if outcome.verdict is Verdict.FAILED:
            return
        self._outcomes[key] = outcome
        while len(self._outcomes) > self._entries:
            self._outcomes.popitem(last=False)


async def _await(judge: Callable[[], Awaitable[Outcome]]) -> Outcome:
    return await judge()
