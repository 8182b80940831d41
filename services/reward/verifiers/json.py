"""JSON: the answer is a value of a schema and, where one is expected, that value."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import jsonschema

from perigee.errors import FieldViolation
from services.reward.check_pool import CheckPool
from services.reward.pattern_checks import NoJsonError, read_json
from services.reward.verifiers.base import Item, Outcome, Parameters, Verifier, read_answer

MAX_SCHEMA_CHARACTERS = 64 << 10


@dataclass(frozen=True)
class JsonParameters(Parameters):
    """JSON texts: a schema of draft 2020-12, empty for any value, and the expected value, None for any."""

    schema: str = ""
    expected: str | None = None


class JsonVerifier(Verifier[JsonParameters]):
    """Correct when the answer is JSON that fulfils the schema and equals the expected value.

    The answer is what follows the marker, or the response; of a fenced block (```json) its content. Numbers are equal
    by value, the order of keys does not count, and `format` in a schema asserts nothing, as the draft has it.
    """

    name: ClassVar[str] = "json"
    version: ClassVar[str] = "1"

    def __init__(self, pool: CheckPool) -> None:
        self._pool = pool

    def find_violations(self, parameters: JsonParameters) -> list[FieldViolation]:
        violations = []
        if not parameters.schema and parameters.expected is None:
            violations.append(FieldViolation("json.schema_json", "is required where no expected_json is given"))
        if problem := find_schema_problem(parameters.schema):
            violations.append(FieldViolation("json.schema_json", problem))
        if parameters.expected is not None:
            try:
                read_json(parameters.expected)
            except (NoJsonError, RecursionError) as error:
                violations.append(FieldViolation("json.expected_json", f"is not JSON: {error}"))
        return violations

    async def judge(self, item: Item[JsonParameters]) -> Outcome:
        answer = read_answer(item)
        if isinstance(answer, Outcome):
            return answer
        request = {
            "kind": "json",
            "schema": item.parameters.schema,
            "expected": item.parameters.expected,
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
    """What is wrong with a schema; empty when nothing is."""
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
