"""Answers judged by a trained model with a scalar head (Kimi k1.5, section 2.3.5), in batches, in its own process."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from perigee.errors import FieldViolation, InternalError, PerigeeError, UnavailableError
from perigee.reward.v1 import reward_pb2 as pb
from services.kit.telemetry import get_logger
from services.reward.config import ValueHeadConfig
from services.reward.pool.workers import WorkerDiedError, WorkerPool
from services.reward.value_head.folder import Description, Encoder, load_tokenizer, read_description
from services.reward.verifiers.base import Item, Outcome, Verdict, Verifier, graded_whole, read_answer

log = get_logger(__name__)

ResultT = TypeVar("ResultT")

DIGEST_CHARACTERS = 12

# Of one sequence: a number, None where it is no number, or why there is none.
Score = float | None | PerigeeError


class ValueHeadVerifier(Verifier[pb.ValueHeadVerifier]):
    """Correct from a probability on; the reward is that of the verdict, or the probability where so configured."""

    name: ClassVar[str] = "value_head"
    version: ClassVar[str] = "1"

    def __init__(self, config: ValueHeadConfig) -> None:
        self._config = config
        if config.path is None:
            self.unavailable = "no model is configured: reward.value_head.path names none made by perigee reward train"
        self._description: Description | None = None
        self._encoder: Encoder | None = None
        command = (sys.executable, "-m", "services.reward.value_head.worker")
        arguments = (config.path or "", config.device, str(config.threads))
        self._pool = WorkerPool((*command, *arguments), 1, config.start_timeout_s, config.timeout_s)
        self._batcher = MicroBatcher[Score](
            self._score, config.max_batch_tokens, config.max_batch_items, config.batch_wait_ms / 1000
        )

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

    def find_violations(self, parameters: pb.ValueHeadVerifier) -> list[FieldViolation]:
        if not parameters.HasField("threshold") or 0 <= parameters.threshold <= 1:
            return []
        return [FieldViolation("value_head.threshold", f"must be from 0 to 1, got {parameters.threshold:g}")]

    def graded_text(self, item: Item[pb.ValueHeadVerifier]) -> str | None:
        return graded_whole(item)

    async def judge(self, item: Item[pb.ValueHeadVerifier]) -> Outcome:
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
        given = item.parameters.threshold if item.parameters.HasField("threshold") else None
        return self._decide(score, self._description.threshold if given is None else given, extracted)

    def _decide(self, score: float, threshold: float, extracted: str) -> Outcome:
        probability = 1 / (1 + math.exp(-score)) if score > -700 else 0.0
        verdict = Verdict.CORRECT if probability >= threshold else Verdict.WRONG
        reward = probability if self._config.reward == "probability" else float(verdict is Verdict.CORRECT)
        reason = f"probability {probability:.4f}, threshold {threshold:.4f}"
        return Outcome(verdict, reward, extracted, reason)

    async def _score(self, sequences: list[Sequence[int]]) -> list[Score]:
        """Returns the scores of one batch; None where a score is no number.

        What the model refuses is found by halving the batch, so that it fails alone.

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
        """Returns the process's reply; a request whose process died is tried once more."""
        end = time.monotonic() + self._config.timeout_s
        try:
            return await self._pool.ask(request)
        except WorkerDiedError:
            if time.monotonic() >= end:
                raise
            return await self._pool.ask(request)


@dataclass
class _Waiting(Generic[ResultT]):
    tokens: Sequence[int]
    future: asyncio.Future[ResultT]


class MicroBatcher(Generic[ResultT]):
    """Gathers what arrives within a few milliseconds, or while a batch is under way, into batches of bounded size.

    Runs one batch at a time, in the order of arrival; `score` gives a result for each sequence of a batch.

    A batch takes at most `max_tokens` tokens, padding included, and at most `max_items` sequences; a longer sequence is
    a batch by itself. A batch that is not full waits `wait_s` for more.
    """

    def __init__(
        self,
        score: Callable[[list[Sequence[int]]], Awaitable[Sequence[ResultT]]],
        max_tokens: int,
        max_items: int,
        wait_s: float,
    ) -> None:
        self._score = score
        self._max_tokens = max_tokens
        self._max_items = max_items
        self._wait_s = wait_s
        # Bounded by the items that the service takes.
        self._waiting: deque[_Waiting[ResultT]] = deque()
        self._arrived = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to run batches."""
        self._running = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Ends the batch under way; whoever waits gets UnavailableError."""
        if self._running is not None:
            self._running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._running
            self._running = None
        self._fail(list(self._waiting), UnavailableError("the service is stopping"))
        self._waiting.clear()

    async def submit(self, tokens: Sequence[int]) -> ResultT:
        """Returns the result of one sequence; raises what its batch raised."""
        waiting = _Waiting[ResultT](tokens, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._arrived.set()
        return await waiting.future

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._wait_s):
                    while not self._is_full():
                        self._arrived.clear()
                        await self._arrived.wait()
            batch = self._take()
            if self._waiting:
                self._arrived.set()
            else:
                self._arrived.clear()
            if batch:
                await self._run_batch(batch)

    async def _run_batch(self, batch: list[_Waiting[ResultT]]) -> None:
        try:
            results = await self._score([waiting.tokens for waiting in batch])
            for waiting, result in zip(batch, results, strict=True):
                if not waiting.future.done():
                    waiting.future.set_result(result)
        except PerigeeError as error:
            self._fail(batch, error)
        except asyncio.CancelledError:
            self._fail(batch, UnavailableError("the service is stopping"))
            raise
        except Exception as error:  # a fault in one batch must not leave the others waiting
            log.exception("batch failed")
            self._fail(batch, InternalError(f"{type(error).__name__}: {error}"))

    def _is_full(self) -> bool:
        return self._count_fitting() < len(self._waiting) or len(self._waiting) >= self._max_items

    def _take(self) -> list[_Waiting[ResultT]]:
        batch = [self._waiting.popleft() for _ in range(self._count_fitting())]
        return [waiting for waiting in batch if not waiting.future.done()]  # their callers have gone away

    def _count_fitting(self) -> int:
        longest = 0
        for count, waiting in enumerate(self._waiting):
            longest = max(longest, len(waiting.tokens))
            if count == self._max_items or (count and (count + 1) * longest > self._max_tokens):
                return count
        return len(self._waiting)

    @staticmethod
    def _fail(batch: Sequence[_Waiting[ResultT]], error: PerigeeError) -> None:
        for waiting in batch:
            if not waiting.future.done():
                waiting.future.set_exception(error)
