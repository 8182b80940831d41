"""Judges single items: by the verifier that their parameters name, through the cache, with metrics."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.kit.telemetry import get_logger
from services.reward.cache import OutcomeCache, content_key
from services.reward.metrics import CACHE_HITS, JUDGEMENT_SECONDS, OUTCOMES
from services.reward.verifiers.base import Item, Outcome, Parameters, Verifier

log = get_logger(__name__)


@dataclass(frozen=True)
class Judgement:
    """An outcome, who found it and how long that took."""

    outcome: Outcome
    verifier: Verifier[Any]
    seconds: float


class Panel:
    """The verifiers by the class of their parameters; whatever a verifier does, its item has an outcome."""

    def __init__(self, verifiers: Mapping[type[Parameters], Verifier[Any]], cache: OutcomeCache) -> None:
        self.verifiers = dict(verifiers)
        self._cache = cache

    def verifier_of(self, parameters: Parameters) -> Verifier[Any]:
        """The verifier that takes the parameters."""
        return self.verifiers[type(parameters)]

    async def judge(self, item: Item[Any]) -> Judgement:
        """The outcome of one item; a fault of its verifier is a FAILED one."""
        verifier = self.verifier_of(item.parameters)
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
        return Judgement(outcome, verifier, seconds)

    async def judge_part(self, item: Item[Any]) -> Outcome:
        """The outcome of one part of a composite."""
        return (await self.judge(item)).outcome
