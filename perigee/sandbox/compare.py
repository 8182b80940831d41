"""Comparison of outputs with expected ones; it happens here, out of every program's reach."""

from __future__ import annotations

import json
from enum import Enum
from typing import Any

from perigee.sandbox.comparisons.json_values import find_value_difference
from perigee.sandbox.comparisons.numbers import Tolerance
from perigee.sandbox.comparisons.outputs import (
    find_beyond_tolerance,
    find_in_any_order,
    find_in_order,
    read_filled_lines,
    read_lines,
    read_raw_lines,
    read_words,
)

__all__ = [
    "Comparison",
    "Tolerance",
    "find_difference",
    "find_result_difference",
    "same_json",
    "same_json_text",
    "same_tokens",
]


class Comparison(Enum):
    """What of an output counts; the names are those of the protocol."""

    EXACT = "EXACT"
    TOKENS = "TOKENS"
    LINES = "LINES"
    UNORDERED_LINES = "UNORDERED_LINES"
    UNORDERED_TOKENS = "UNORDERED_TOKENS"


_ORDERED = {
    Comparison.EXACT: (read_raw_lines, "line"),
    Comparison.TOKENS: (read_words, "token"),
    Comparison.LINES: (read_lines, "line"),
}
_UNORDERED = {
    Comparison.UNORDERED_LINES: (read_filled_lines, "line"),
    Comparison.UNORDERED_TOKENS: (read_words, "token"),
}


def find_difference(actual: bytes, expected: bytes, how: Comparison | Tolerance) -> str | None:
    """Why an output is not the expected one, such as `token 3 is "7", expected "8"`, or None when it is.

    Both outputs are compared to their ends. With a tolerance, words that are numbers may differ by it and all others
    must be the same. An output of 10 MB takes from a tenth of a second to two: call it off the event loop.
    """
    if actual == expected:
        return None
    if isinstance(how, Tolerance):
        return find_beyond_tolerance(actual, expected, how)
    if how in _ORDERED:
        return find_in_order(actual, expected, *_ORDERED[how])
    return find_in_any_order(actual, expected, *_UNORDERED[how])


def find_result_difference(actual: bytes, expected: Any, tolerance: Tolerance | None = None) -> str | None:
    """Why a function's result, as JSON, is not the expected value, or None when it is; what does not parse is not."""
    try:
        value = json.loads(actual)
    except (ValueError, RecursionError) as error:
        return f"result is not JSON: {error}"
    return find_value_difference(value, expected, tolerance)


def same_tokens(actual: bytes, expected: bytes) -> bool:
    """Whether both outputs hold the same words, however they are spaced."""
    return find_difference(actual, expected, Comparison.TOKENS) is None


def same_json(actual: Any, expected: Any, tolerance: Tolerance | None = None) -> bool:
    """Whether two JSON values are equal: 1 and 1.0 are, True and 1 are not, NaN equals itself."""
    return find_value_difference(actual, expected, tolerance) is None


def same_json_text(actual: bytes, expected: Any, tolerance: Tolerance | None = None) -> bool:
    """Whether a program's JSON is the expected value; what does not parse is not."""
    return find_result_difference(actual, expected, tolerance) is None
