"""When two outputs count as the same: the sandbox's own comparisons, as conditions on two outputs that are at hand."""

from __future__ import annotations

from collections.abc import Callable

from perigee.sandbox.compare import Comparison as How
from perigee.sandbox.compare import Tolerance, find_difference

# Called with an output and the expected one.
Comparison = Callable[[bytes, bytes], bool]


def compare_by(how: How | Tolerance) -> Comparison:
    """Whether an output is the expected one, by what of it counts."""

    def same(actual: bytes, expected: bytes) -> bool:
        return find_difference(actual, expected, how) is None

    return same


same_bytes = compare_by(How.EXACT)
same_tokens = compare_by(How.TOKENS)
same_lines = compare_by(How.LINES)
same_unordered_lines = compare_by(How.UNORDERED_LINES)
same_unordered_tokens = compare_by(How.UNORDERED_TOKENS)


def same_floats(absolute: float, relative: float) -> Comparison:
    """Numbers within either tolerance of the expected ones; other words must be the same."""
    return compare_by(Tolerance(absolute, relative))
