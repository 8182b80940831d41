"""Comparison of outputs with expected ones; it happens here, out of every program's reach."""

from __future__ import annotations

import json
from typing import Any


def same_tokens(actual: bytes, expected: bytes) -> bool:
    """Whether both outputs hold the same words, however they are spaced."""
    return actual.split() == expected.split()


def same_json(actual: Any, expected: Any) -> bool:
    """Whether two JSON values are equal: 1 and 1.0 are, True and 1 are not, NaN equals itself."""
    if isinstance(actual, bool) or isinstance(expected, bool):
        return actual is expected
    if isinstance(actual, int | float) and isinstance(expected, int | float):
        return actual == expected or (actual != actual and expected != expected)
    if isinstance(actual, list) and isinstance(expected, list):
        return len(actual) == len(expected) and all(map(same_json, actual, expected))
    if isinstance(actual, dict) and isinstance(expected, dict):
        return actual.keys() == expected.keys() and all(same_json(actual[key], expected[key]) for key in actual)
    return type(actual) is type(expected) and bool(actual == expected)


def same_json_text(actual: bytes, expected: Any) -> bool:
    """Whether a program's JSON is the expected value; what does not parse is not."""
    try:
        return same_json(json.loads(actual), expected)
    except (ValueError, RecursionError):
        return False
