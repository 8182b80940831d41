"""Answers checked by a pattern: a regular expression, or JSON of a schema and, where one is expected, of a value."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import ClassVar

import jsonschema
import regex

from perigee.errors import FieldViolation
from perigee.reward.v1 import reward_pb2 as pb
from services.reward.config import PatternConfig
from services.reward.pool.pattern_checks import NoJsonError, compile_pattern, read_json
from services.reward.pool.workers import CheckPool
from services.reward.verifiers.base import Item, Outcome, Verifier, extract_answer, read_answer

MAX_PATTERN_CHARACTERS = 2000
# The pattern's own timeout ends before its process is killed: a kill costs a fork.
SHARE_OF_DEADLINE = 0.9
MAX_SCHEMA_CHARACTERS = 64 << 10


class RegexVerifier(Verifier[pb.RegexVerifier]):
    """Correct when the pattern matches the whole answer, white space around it aside, or is found in the response."""

    name: ClassVar[str] = "regex"
    version: ClassVar[str] = "1"

    def __init__(self, config: PatternConfig, pool: CheckPool) -> None:
        self._timeout_s = config.check_timeout_s * SHARE_OF_DEADLINE
        self._pool = pool

    def find_violations(self, parameters: pb.RegexVerifier) -> list[FieldViolation]:
        if not parameters.pattern:
            return [FieldViolation("regex.pattern", "is required")]
        if len(parameters.pattern) > MAX_PATTERN_CHARACTERS:
            return [FieldViolation("regex.pattern", f"has more than {MAX_PATTERN_CHARACTERS} characters")]
        try:
            compile_pattern(parameters.pattern, parameters.ignore_case)
        except (regex.error, ValueError, OverflowError, RecursionError) as error:
            return [FieldViolation("regex.pattern", f"is no regular expression: {error}")]
        return []

    def graded_text(self, item: Item[pb.RegexVerifier]) -> str | None:
        if item.parameters.search_response:
            return item.response
        return extract_answer(item.response, item.answer_marker)

    async def judge(self, item: Item[pb.RegexVerifier]) -> Outcome:
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


class JsonVerifier(Verifier[pb.JsonVerifier]):
    """Correct when the answer is JSON that fulfils the schema and equals the expected value.

    The answer is what follows the marker, or the response; of a fenced block (```json) its content. Numbers are equal
    by value, the order of keys does not count, and `format` in a schema asserts nothing, as the draft has it.
    """

    name: ClassVar[str] = "json"
    version: ClassVar[str] = "1"

    def __init__(self, pool: CheckPool) -> None:
        self._pool = pool

    def find_violations(self, parameters: pb.JsonVerifier) -> list[FieldViolation]:
        violations = []
        if not parameters.schema_json and not parameters.HasField("expected_json"):
            violations.append(FieldViolation("json.schema_json", "is required where no expected_json is given"))
        if problem := find_schema_problem(parameters.schema_json):
            violations.append(FieldViolation("json.schema_json", problem))
        if parameters.HasField("expected_json"):
            try:
                read_json(parameters.expected_json)
            except (NoJsonError, RecursionError) as error:
                violations.append(FieldViolation("json.expected_json", f"is not JSON: {error}"))
        return violations

    async def judge(self, item: Item[pb.JsonVerifier]) -> Outcome:
        answer = read_answer(item)
        if isinstance(answer, Outcome):
            return answer
        parameters = item.parameters
        request = {
            "kind": "json",
            "schema": parameters.schema_json,
            "expected": parameters.expected_json if parameters.HasField("expected_json") else None,
            "text": answer,
        }
        reply = await self._pool.check(request)
        match reply.status:
            case "equal":
                return Outcome.correct(answer)
            case "different":
                return Outcome.wrong(answer, reply.reason)
            case "unreadable":
                return Outcome.ungradable(reply.reason, answer)
        return reply.failure(answer)


@lru_cache(maxsize=64)
def find_schema_problem(schema: str) -> str:
    """Returns what is wrong with a schema; empty when nothing is."""
    if not schema:
        return ""
    if len(schema) > MAX_SCHEMA_CHARACTERS:
        return f"has more than {MAX_SCHEMA_CHARACTERS} characters"
    try:
        jsonschema.Draft202012Validator.check_schema(json.loads(schema))
    except jsonschema.SchemaError as error:
        return f"is no JSON Schema: {error.json_path}: {error.message}"
    except (ValueError, RecursionError) as error:
        return f"is not JSON: {error}"
    return ""
