"""Regular expressions: the answer, or something in the response, matches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import regex

from perigee.errors import FieldViolation
from services.reward.check_pool import CheckPool
from services.reward.config import PatternConfig
from services.reward.pattern_checks import compile_pattern
from services.reward.verifiers.base import Item, Outcome, Parameters, Verifier, extract_answer

MAX_PATTERN_CHARACTERS = 2000
# The pattern's own timeout ends before its process is killed: a kill costs a fork.
SHARE_OF_DEADLINE = 0.9


@dataclass(frozen=True)
class RegexParameters(Parameters):
    """A pattern of Python's syntax, as the `regex` package has it."""

    pattern: str
    ignore_case: bool = False
    search_response: bool = False


class RegexVerifier(Verifier[RegexParameters]):
    """Correct when the pattern matches the whole answer, white space around it aside, or is found in the response."""

    name: ClassVar[str] = "regex"
    version: ClassVar[str] = "1"

    def __init__(self, config: PatternConfig, pool: CheckPool) -> None:
        self._timeout_s = config.check_timeout_s * SHARE_OF_DEADLINE
        self._pool = pool

    def find_violations(self, parameters: RegexParameters) -> list[FieldViolation]:
        if not parameters.pattern:
            return [FieldViolation("regex.pattern", "is required")]
        if len(parameters.pattern) > MAX_PATTERN_CHARACTERS:
            return [FieldViolation("regex.pattern", f"has more than {MAX_PATTERN_CHARACTERS} characters")]
        try:
            compile_pattern(parameters.pattern, parameters.ignore_case)
        except (regex.error, ValueError, OverflowError, RecursionError) as error:
            return [FieldViolation("regex.pattern", f"is no regular expression: {error}")]
        return []

    def graded_text(self, item: Item[RegexParameters]) -> str | None:
        if item.parameters.search_response:
            return item.response
        return extract_answer(item.response, item.answer_marker)

    async def judge(self, item: Item[RegexParameters]) -> Outcome:
        text = self.graded_text(item)
        if text is None:
            return Outcome.ungradable(f"the response has no answer marker {item.answer_marker!r}")
        request = {
            "kind": "regex",
            "pattern": item.parameters.pattern,
            "ignore_case": item.parameters.ignore_case,
            "search": item.parameters.search_response,
            "text": text,
            "timeout_s": self._timeout_s,
        }
        reply = await self._pool.check(request)
        extracted = "" if item.parameters.search_response else text
        match reply.status:
            case "match":
                return Outcome.correct(extracted or reply.reason)
            case "different":
                return Outcome.wrong(extracted, reply.reason)
        return reply.failure(extracted)
