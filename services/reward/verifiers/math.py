"""Mathematical answers: plain forms in process, everything else by a computer algebra system that may be killed."""

from __future__ import annotations

from typing import ClassVar

from perigee.errors import FieldViolation
from perigee.reward.v1 import reward_pb2 as pb
from services.reward.mathematics.answers import find_final_answer
from services.reward.mathematics.compare import Algebra, agree
from services.reward.mathematics.expectations import expect
from services.reward.mathematics.families import Family
from services.reward.mathematics.quantities import express_in
from services.reward.mathematics.questions import with_question
from services.reward.mathematics.shapes import Relation
from services.reward.pool.workers import CheckPool
from services.reward.verifiers.base import Item, Outcome, Verifier, extract_answer

# Longer answers are taken apart in a process of their own, so that nobody waits for them.
IN_PROCESS_CHARACTERS = 400
# Nobody answers at such length; a longer reference allows a longer answer.
MAX_ANSWER_CHARACTERS = 10_000
LONGER_THAN_REFERENCE = 4


class NeedsAlgebraError(Exception):
    """Two expressions that cannot be compared without a computer algebra system."""


class NoAlgebra(Algebra):
    """Decides nothing."""

    def equal(self, expected: str, found: str) -> bool:
        raise NeedsAlgebraError

    def same_relation(self, expected: Relation, found: Relation) -> bool:
        raise NeedsAlgebraError

    def same_family(self, expected: Family, found: Family) -> bool:
        raise NeedsAlgebraError


NO_ALGEBRA = NoAlgebra()


class MathVerifier(Verifier[pb.MathVerifier]):
    """Compares the response's final answer with the reference, as mathematics: see `mathematics.compare`.

    The answer is the last box, what is announced as the answer, or what the last sentence states that is no check, no
    remark and no question; after an answer marker it is what the marker's line says. The reference's form and unit, and
    what the prompt asks for, help to choose among the values of a sentence; the reference's value does not.
    """

    name: ClassVar[str] = "math"
    version: ClassVar[str] = "4"

    def __init__(self, pool: CheckPool) -> None:
        self._pool = pool

    def find_violations(self, parameters: pb.MathVerifier) -> list[FieldViolation]:
        violations = []
        if not parameters.reference.strip():
            violations.append(FieldViolation("math.reference", "is required: the answer to compare with"))
        for index, alternative in enumerate(parameters.alternatives):
            if not alternative.strip():
                violations.append(FieldViolation(f"math.alternatives[{index}]", "is empty"))
        return violations

    def graded_text(self, item: Item[pb.MathVerifier]) -> str | None:
        answer = find_answer(item)
        return f"no answer: {explain_absence(item)}" if answer is None else f"answer: {answer}"

    async def judge(self, item: Item[pb.MathVerifier]) -> Outcome:
        answer = find_answer(item)
        if answer is None:
            return Outcome.ungradable(explain_absence(item))
        references = [item.parameters.reference, *item.parameters.alternatives]
        most = max(MAX_ANSWER_CHARACTERS, LONGER_THAN_REFERENCE * max(map(len, references)))
        if len(answer) > most:
            return Outcome.ungradable(f"the answer has {len(answer)} characters, more than {most}", answer)
        undecided = references
        if max(map(len, [answer, *references])) <= IN_PROCESS_CHARACTERS:
            verdicts = {reference: compare_plainly(reference, answer) for reference in references}
            if any(verdicts.values()):
                return Outcome.correct(answer)
            undecided = [reference for reference, verdict in verdicts.items() if verdict is None]
            if not undecided:
                return Outcome.wrong(answer)
        reply = await self._pool.check({"references": undecided, "answer": answer})
        match reply.status:
            case "equal":
                return Outcome.correct(answer)
            case "different":
                return Outcome.wrong(answer)
            case "unreadable":
                return Outcome.ungradable(reply.reason, answer)
        return reply.failure(answer)


def compare_plainly(reference: str, answer: str) -> bool | None:
    """Whether the answer is the reference; None when that takes algebra."""
    try:
        return agree(reference, answer, NO_ALGEBRA)
    except NeedsAlgebraError:
        return None


def find_answer(item: Item[pb.MathVerifier]) -> str | None:
    """The final answer; None when there is none."""
    text = extract_answer(item.response, item.answer_marker)
    if not text:
        return None
    expectation = with_question(expect(item.parameters.reference), item.prompt)
    answer = find_final_answer(text, marked=bool(item.answer_marker), expectation=expectation)
    return express_in(answer, *expectation.asked_unit) if answer and expectation.asked_unit else answer


def explain_absence(item: Item[pb.MathVerifier]) -> str:
    """Why there is no answer."""
    text = extract_answer(item.response, item.answer_marker)
    if text is None:
        return f"the response has no answer marker {item.answer_marker!r}"
    return "the response gives no final answer" if text else "the answer is empty"
