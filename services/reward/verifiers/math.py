"""Mathematical answers: plain numbers in process, everything else by math-verify in killable processes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

from perigee.errors import FieldViolation
from services.reward.config import MathConfig
from services.reward.plain_numbers import compare_plainly
from services.reward.verifiers.base import Item, Outcome, Parameters, Verifier, extract_answer
from services.reward.worker_pool import WorkerDiedError, WorkerPool

ATTEMPTS = 2
MAX_EXTRACTED_CHARACTERS = 1000
# Over the worker's own deadline: it kills by itself, this is for a worker that is stopped.
GRACE_S = 5.0


@dataclass(frozen=True)
class MathParameters(Parameters):
    """The answer to compare with, a number, an expression or LaTeX, and others that are as good."""

    reference: str
    alternatives: tuple[str, ...] = ()


class MathVerifier(Verifier[MathParameters]):
    """Compares the response's final answer with the reference, as mathematics."""

    name: ClassVar[str] = "math"
    version: ClassVar[str] = "1"

    def __init__(self, config: MathConfig) -> None:
        self._config = config
        command = (sys.executable, "-m", "services.reward.math_worker", str(config.memory_bytes))
        self.pool = WorkerPool(command, config.workers, config.start_timeout_s)

    async def start(self) -> None:
        await self.pool.start()

    async def close(self) -> None:
        await self.pool.close()

    def find_violations(self, parameters: MathParameters) -> list[FieldViolation]:
        if parameters.reference.strip():
            return []
        return [FieldViolation("math.reference", "is required: the answer to compare with")]

    async def judge(self, item: Item[MathParameters]) -> Outcome:
        answer = extract_answer(item.response, item.answer_marker)
        if answer is None:
            return Outcome.ungradable(f"the response has no answer marker {item.answer_marker!r}")
        if not answer:
            return Outcome.ungradable("the answer is empty")
        extracted = answer[:MAX_EXTRACTED_CHARACTERS]
        plain = compare_plainly(item.parameters.reference, answer)
        if plain is not None:
            return Outcome.correct(extracted) if plain else Outcome.wrong(extracted)
        request = {
            "reference": item.parameters.reference,
            "answer": answer,
            "whole_response": not item.answer_marker,
            "deadline_s": self._config.check_timeout_s,
        }
        return await self._judge_in_worker(request, extracted)

    async def _judge_in_worker(self, request: dict[str, Any], extracted: str) -> Outcome:
        reply = {"status": "died", "reason": ""}
        for _ in range(ATTEMPTS):
            try:
                reply = await self.pool.ask(request, self._config.check_timeout_s + GRACE_S)
            except WorkerDiedError as error:
                reply = {"status": "died", "reason": error.message}
            if reply["status"] != "died":
                break
        reason = reply["reason"]
        match reply["status"]:
            case "equal":
                return Outcome.correct(extracted)
            case "different":
                return Outcome.wrong(extracted)
            case "unreadable":
                return Outcome.ungradable(reason, extracted)
            case "died":
                return Outcome.failed(f"{reason} {ATTEMPTS} times", retryable=True, extracted=extracted)
        return Outcome.failed(reason, retryable=False, extracted=extracted)
