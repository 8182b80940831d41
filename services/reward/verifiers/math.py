"""Mathematical answers: plain forms in process, everything else by a computer algebra system that may be killed."""

from __future__ import annotations

import re
from typing import ClassVar

from perigee.errors import FieldViolation
from perigee.reward.v1 import reward_pb2 as pb
from services.reward.math.compare import Algebra, agree
from services.reward.math.extract import Extraction, Found, Search, find_answers
from services.reward.math.form import find_fault
from services.reward.math.notation import MAX_DEPTH, nesting
from services.reward.math.parse import Relation
from services.reward.math.reference import check_reference, describe
from services.reward.pool.workers import CheckPool
from services.reward.verifiers.base import Item, Outcome, Verdict, Verifier

# Longer answers are taken apart in a process of their own, so that nobody waits for them.
IN_PROCESS_CHARACTERS = 400
# Nobody answers at such length; a longer reference allows a longer answer.
MAX_ANSWER_CHARACTERS = 10_000
LONGER_THAN_REFERENCE = 4
DECIMAL = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
# A double has no more.
MAX_DECIMALS = 15
# Levels that are not the default.
EXTRACTIONS = {
    pb.ANSWER_EXTRACTION_BOXED: Extraction.BOXED,
    pb.ANSWER_EXTRACTION_MARKER: Extraction.MARKER,
    pb.ANSWER_EXTRACTION_PROSE: Extraction.PROSE,
}


class NeedsAlgebraError(Exception):
    """Two expressions that cannot be compared without a computer algebra system."""


class NoAlgebra(Algebra):
    """Decides nothing."""

    def equal(self, expected: str, found: str) -> bool:
        raise NeedsAlgebraError

    def same_relation(self, expected: Relation, found: Relation) -> bool:
        raise NeedsAlgebraError


NO_ALGEBRA = NoAlgebra()


class MathVerifier(Verifier[pb.MathVerifier]):
    """Compares the response's final answer with the reference, as mathematics: see `math.extract` and `math.compare`.

    Where a response gives several answers side by side, all of them must be right. The reference tells how many values
    are asked for and whether they are words; its value does not help to find the answer.
    """

    name: ClassVar[str] = "math"
    version: ClassVar[str] = "5"

    def __init__(self, pool: CheckPool) -> None:
        self._pool = pool

    def find_violations(self, parameters: pb.MathVerifier) -> list[FieldViolation]:
        fields = ["math.reference", *(f"math.alternatives[{index}]" for index in range(len(parameters.alternatives)))]
        faults = map(check_reference, references_of(parameters))
        found = [FieldViolation(field, fault) for field, fault in zip(fields, faults, strict=True) if fault]
        if parameters.decimals > MAX_DECIMALS:
            found.append(FieldViolation("math.decimals", f"must be at most {MAX_DECIMALS}, is {parameters.decimals}"))
        return found

    def graded_text(self, item: Item[pb.MathVerifier]) -> str | None:
        found = extract(item)
        prompt = "" if item.parameters.form == pb.ANSWER_FORM_VALUE else item.prompt
        return repr((prompt, found.answers, found.reason))

    async def judge(self, item: Item[pb.MathVerifier]) -> Outcome:
        found = extract(item)
        if not found.answers:
            return Outcome.ungradable(found.reason)
        outcomes = [await self._judge_answer(item, answer) for answer in found.answers]
        verdicts = {outcome.verdict for outcome in outcomes}
        if Verdict.FAILED not in verdicts and Verdict.CORRECT in verdicts and len(verdicts) > 1:
            return Outcome.ungradable("the response gives different answers", " | ".join(found.answers))
        return next((outcome for outcome in outcomes if outcome.verdict is Verdict.FAILED), outcomes[-1])

    async def _judge_answer(self, item: Item[pb.MathVerifier], answer: str) -> Outcome:
        references = references_of(item.parameters)
        if item.parameters.HasField("decimals"):
            answer = round_decimal(answer, item.parameters.decimals)
        most = max(MAX_ANSWER_CHARACTERS, LONGER_THAN_REFERENCE * max(map(len, references)))
        if len(answer) > most:
            return Outcome.ungradable(f"the answer has {len(answer)} characters, more than {most}", answer)
        if nesting(answer) > MAX_DEPTH:
            return Outcome.ungradable(f"the answer nests brackets more than {MAX_DEPTH} deep", answer)
        undecided = []
        for reference in references:
            verdict = compare_plainly(reference, answer)
            if verdict:
                return grade_form(item, reference, answer)
            undecided += [reference] if verdict is None else []
        if not undecided:
            return Outcome.wrong(answer)
        reply = await self._pool.check({"references": undecided, "answer": answer})
        match reply.status:
            case "equal":
                return grade_form(item, reply.reason, answer)
            case "different":
                return Outcome.wrong(answer)
            case "unreadable":
                return Outcome.ungradable(reply.reason, answer)
        return reply.failure(answer)


def references_of(parameters: pb.MathVerifier) -> tuple[str, ...]:
    """Returns all answers that are right."""
    return (parameters.reference, *parameters.alternatives)


def round_decimal(answer: str, decimals: int) -> str:
    """Returns a decimal number, perhaps between dollar signs, rounded to so many decimals; others as they are."""
    number = answer.strip(" $").replace(",", "")
    return f"{float(number):.{decimals}f}" if DECIMAL.fullmatch(number) else answer


def extract(item: Item[pb.MathVerifier]) -> Found:
    """Finds the final answer of a response."""
    asked = describe(item.parameters.reference)
    level = EXTRACTIONS.get(item.parameters.extraction, Extraction.ANNOUNCED)
    return find_answers(item.response, Search(level, item.answer_marker, asked.parts, asked.is_verbal, item.prompt))


def compare_plainly(reference: str, answer: str) -> bool | None:
    """Returns whether the answer is the reference; None when that takes algebra, or is too long to be done here."""
    if max(len(reference), len(answer)) > IN_PROCESS_CHARACTERS:
        return None
    try:
        return agree(reference, answer, NO_ALGEBRA)
    except NeedsAlgebraError:
        return None


def grade_form(item: Item[pb.MathVerifier], reference: str, answer: str) -> Outcome:
    """Grades an answer of the right value by its form."""
    is_free = item.parameters.form == pb.ANSWER_FORM_VALUE
    fault = "" if is_free else find_fault(reference, answer, item.prompt)
    return Outcome.wrong(answer, f"the answer has the right value, but {fault}") if fault else Outcome.correct(answer)
