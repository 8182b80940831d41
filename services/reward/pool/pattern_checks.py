"""The checks of the regex and json verifiers, in their process: both may never end on a bad pattern.

{"kind": "regex", "pattern", "ignore_case", "search", "text", "timeout_s"} or {"kind": "json", "schema", "expected",
"text"}, where schema and expected are JSON texts and expected may be null.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

import jsonschema
import referencing
import regex
from jsonschema.exceptions import best_match

# A schema may not have other documents fetched.
NO_DOCUMENTS: referencing.Registry[Any] = referencing.Registry()
FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL | re.IGNORECASE)
MAX_REASON_CHARACTERS = 300


class NoJsonError(ValueError):
    """A text that is not JSON."""


def warm_up() -> None:
    """Loads the draft's own schemas."""
    check({"kind": "json", "schema": '{"type": "object"}', "expected": None, "text": "{}"})


def check(request: dict[str, Any]) -> dict[str, str]:
    """Returns the result of one check."""
    return check_regex(request) if request["kind"] == "regex" else check_json(request)


def check_regex(request: dict[str, Any]) -> dict[str, str]:
    """Returns whether the pattern matches the text: "match" with what it matched, "different" or "deadline"."""
    pattern = compile_pattern(request["pattern"], request["ignore_case"])
    find = pattern.search if request["search"] else pattern.fullmatch
    try:
        match = find(request["text"], timeout=request["timeout_s"])
    except TimeoutError:
        return {"status": "deadline", "reason": f"the pattern did not end within {request['timeout_s']:g} s"}
    if match is None:
        return {"status": "different", "reason": "the pattern does not match"}
    return {"status": "match", "reason": match[0][:MAX_REASON_CHARACTERS]}


def compile_pattern(pattern: str, ignore_case: bool) -> regex.Pattern[str]:
    """Raises regex.error."""
    return regex.compile(pattern, regex.IGNORECASE if ignore_case else 0)


def check_json(request: dict[str, Any]) -> dict[str, str]:
    """Returns whether the text is JSON of the schema and the expected value: "equal", "different" or "unreadable"."""
    try:
        value = read_json(strip_fence(request["text"]))
    except (NoJsonError, RecursionError) as error:
        return {"status": "unreadable", "reason": f"the answer is not JSON: {error}"[:MAX_REASON_CHARACTERS]}
    if request["schema"]:
        fault = best_match(validator_of(request["schema"]).iter_errors(value))
        if fault is not None:
            return {"status": "different", "reason": f"{fault.json_path}: {fault.message}"[:MAX_REASON_CHARACTERS]}
    if request["expected"] is not None and not values_agree(read_json(request["expected"]), value):
        return {"status": "different", "reason": "the answer is not the expected value"}
    return {"status": "equal", "reason": ""}


@lru_cache(maxsize=64)
def validator_of(schema: str) -> jsonschema.Draft202012Validator:
    """Returns the validator of a schema that is right."""
    return jsonschema.Draft202012Validator(json.loads(schema), registry=NO_DOCUMENTS)


def strip_fence(text: str) -> str:
    """Returns the last fenced block of a text, or the text."""
    blocks = FENCE.findall(text)
    return str(blocks[-1]) if blocks else text


def read_json(text: str) -> Any:
    """A JSON value, where NaN and Infinity are none.

    Raises NoJsonError.
    """
    try:
        return json.loads(text, parse_constant=refuse_constant)
    except ValueError as error:
        raise NoJsonError(str(error)) from error


def refuse_constant(name: str) -> None:
    """Refuses Python's own constants, which are not JSON."""
    raise NoJsonError(f"{name} is no JSON value")


def values_agree(expected: Any, found: Any) -> bool:
    """Returns whether JSON values are equal: 1 is 1.0 but not true, the order of keys does not count."""
    if isinstance(expected, dict) and isinstance(found, dict):
        return expected.keys() == found.keys() and all(values_agree(expected[key], found[key]) for key in expected)
    if isinstance(expected, list) and isinstance(found, list):
        return len(expected) == len(found) and all(map(values_agree, expected, found))
    return isinstance(expected, bool) == isinstance(found, bool) and bool(expected == found)
