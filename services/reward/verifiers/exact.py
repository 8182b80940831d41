"""Exact answers: the reference, but for white space around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from perigee.errors import FieldViolation
from services.reward.verifiers.base import Item, Outcome, Parameters, Verifier, read_answer


@dataclass(frozen=True)
class ExactParameters(Parameters):
    """The answer."""

    reference: str


class ExactVerifier(Verifier[ExactParameters]):
    """Correct when answer and reference are the same text once white space at both ends is cut; case and all count.

    The answer is what follows the marker, or the whole response.
    """

    name: ClassVar[str] = "exact"
    version: ClassVar[str] = "1"

    def find_violations(self, parameters: ExactParameters) -> list[FieldViolation]:
        return [] if parameters.reference.strip() else [FieldViolation("exact.reference", "is required")]

    async def judge(self, item: Item[ExactParameters]) -> Outcome:
        answer = read_answer(item)
        if isinstance(answer, Outcome):
            return answer
        return Outcome.correct(answer) if answer == item.parameters.reference.strip() else Outcome.wrong(answer)
