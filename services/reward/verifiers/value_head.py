"""Answers judged by a trained model with a scalar head (Kimi k1.5, section 2.3.5), in batches, in its own process."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from perigee.errors import FieldViolation, InternalError, PerigeeError, UnavailableError
from services.reward.config import ValueHeadConfig
from services.reward.value_head.folder import Description, read_description
from services.reward.value_head.micro_batcher import MicroBatcher
from services.reward.value_head.template import Encoder, load_tokenizer
from services.reward.verifiers.base import Item, Outcome, Parameters, Verdict, Verifier, graded_whole, read_answer
from services.reward.worker_pool import WorkerDiedError, WorkerPool

DIGEST_CHARACTERS = 12

# Of one sequence: a number, None where it is no number, or why there is none.
Score = float | None | PerigeeError


@dataclass(frozen=True)
class ValueHeadParameters(Parameters):
    """The reference answer, and from which probability on a response is right if not from the model's own."""

    reference: str
    threshold: float | None = None


class ValueHeadVerifier(Verifier[ValueHeadParameters]):
    """Correct from a probability on; the reward is that of the verdict, or the probability where so configured."""

    name: ClassVar[str] = "value_head"
    version: ClassVar[str] = "1"

    def __init__(self, config: ValueHeadConfig) -> None:
        self._config = config
        self._description: Description | None = None
        self._encoder: Encoder | None = None
        command = (sys.executable, "-m", "services.reward.value_head.worker")
        arguments = (config.path or "", config.device, str(config.threads))
        self._pool = WorkerPool((*command, *arguments), 1, config.start_timeout_s, config.timeout_s)
        self._batcher = MicroBatcher[Score](
            self._score, config.max_batch_tokens, config.max_batch_items, config.batch_wait_ms / 1000
        )

    @property
    def unavailable(self) -> str:
        if self._config.path is not None:
            return ""
        return "no model is configured: set reward.value_head.path to a folder made by perigee reward train"

    async def start(self) -> None:
        if self._config.path is None:
            return
        folder = Path(self._config.path)
        description = self._description = read_description(folder)
        self._encoder = Encoder(
            load_tokenizer(folder), description.max_tokens, description.end_token_id, description.template
        )
        # The instance's, because it depends on the model.
        self.version = f"1-{description.digest[:DIGEST_CHARACTERS]}"  # type: ignore[misc]
        try:
            await self._pool.start()
        except WorkerDiedError as error:
            raise UnavailableError(
                f"reward.value_head.path: the model in {folder} does not start: {error.message}; see the log"
            ) from error
        await self._batcher.start()

    async def close(self) -> None:
        await self._batcher.close()
        await self._pool.close()

    def find_violations(self, parameters: ValueHeadParameters) -> list[FieldViolation]:
        threshold = parameters.threshold
        if threshold is None or 0 <= threshold <= 1:
            return []
        return [FieldViolation("value_head.threshold", f"must be from 0 to 1, got {threshold:g}")]

    def graded_text(self, item: Item[ValueHeadParameters]) -> str | None:
        return graded_whole(item)

    async def judge(self, item: Item[ValueHeadParameters]) -> Outcome:
        answer = read_answer(item)
        if isinstance(answer, Outcome):
            return answer
        if self._encoder is None or self._description is None:
            return Outcome.failed(self.unavailable or "the model is not loaded", retryable=False)
        extracted = answer if item.answer_marker else ""
        reference = item.parameters.reference
        # Long texts take long enough to hold others up.
        tokens = await asyncio.to_thread(self._encoder.encode, item.prompt, reference, answer)
        try:
            score = await self._batcher.submit(tokens)
        except PerigeeError as error:
            score = error
        if isinstance(score, PerigeeError):
            retryable = not isinstance(score, InternalError)
            return Outcome.failed(score.message, retryable=retryable, extracted=extracted)
        if score is None:
            return Outcome.failed("the model's score is not a number", retryable=False, extracted=extracted)
        given = item.parameters.threshold
        return self._decide(score, self._description.threshold if given is None else given, extracted)

    def _decide(self, score: float, threshold: float, extracted: str) -> Outcome:
        probability = 1 / (1 + math.exp(-score)) if score > -700 else 0.0
        verdict = Verdict.CORRECT if probability >= threshold else Verdict.WRONG
        reward = probability if self._config.reward == "probability" else float(verdict is Verdict.CORRECT)
        reason = f"probability {probability:.4f}, threshold {threshold:.4f}"
        return Outcome(verdict, reward, extracted, reason)

    async def _score(self, sequences: list[Sequence[int]]) -> list[Score]:
        """The scores of one batch; None where a score is no number. What the model refuses is found in halves, so that
        it fails alone.

        Raises WorkerDiedError when the process dies twice or takes too long.
        """
        reply = await self._ask({"sequences": sequences})
        if reply["status"] == "scored":
            scores: list[Score] = reply["scores"]
            return scores
        if len(sequences) == 1:
            return [(UnavailableError if reply["retryable"] else InternalError)(reply["reason"])]
        half = len(sequences) // 2
        return [*await self._score(sequences[:half]), *await self._score(sequences[half:])]

    async def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The process's reply; a request whose process died is tried once more."""
        end = time.monotonic() + self._config.timeout_s
        try:
            return await self._pool.ask(request)
        except WorkerDiedError:
            if time.monotonic() >= end:
                raise
            return await self._pool.ask(request)
