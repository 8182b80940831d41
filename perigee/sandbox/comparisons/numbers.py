"""Numbers within a tolerance of the expected ones."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

_ROUNDING = 2 * sys.float_info.epsilon
_MAX_DIGITS = 4300
"""Digits of the longest integer that is read as one: Python's own limit, so that reading stays linear in practice."""
_SIGNS = (b"+", b"-")


@dataclass(frozen=True)
class Tolerance:
    """How far a number may be from the expected one: it passes when it is within either.

    Raises ValueError unless both are finite and not negative.
    """

    absolute: float = 0.0
    relative: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("absolute", self.absolute), ("relative", self.relative)):
            if not 0 <= value < math.inf:
                raise ValueError(f"the {name} tolerance must be finite and not negative, got {value}")


def read_number(word: bytes) -> int | float | None:
    """The number that a word spells, or None when it spells none.

    Decimal integers and decimal fractions with or without exponent, nan, inf and infinity; not the hexadecimal and
    underscored forms of programming languages. What is too large for a double, or has more than 4,300 digits, is no
    number either: it would equal everything else that is too large.
    """
    digits = word[1:] if word.startswith(_SIGNS) else word
    if digits.isdigit():
        return int(word) if len(digits) <= _MAX_DIGITS else None
    if b"_" in word:
        return None
    try:
        number = float(word)
    except ValueError:
        return None
    is_spelled_out = digits[:1].isalpha()
    return number if is_spelled_out or math.isfinite(number) else None


def is_close(actual: float, expected: float, tolerance: Tolerance) -> bool:
    """Whether a number is as expected, as testlib's doubleCompare decides it: within either tolerance, nan only for nan
    and an infinity only for itself.

    Two integers are compared exactly, however large, all else as doubles. The bound itself passes in spite of rounding.
    """
    if actual == expected:
        return True
    if isinstance(actual, int) and isinstance(expected, int):
        distance = abs(actual - expected)
        return distance <= tolerance.absolute or distance <= _as_written(tolerance.relative) * abs(expected)
    if actual != actual or expected != expected:
        return actual != actual and expected != expected
    try:
        left, right = float(actual), float(expected)
    except OverflowError:  # an integer past every double, and a double
        return False
    difference = abs(left - right)
    allowed = max(tolerance.absolute, tolerance.relative * abs(right))
    # both numbers and the bound were rounded when they were read
    bound = allowed + _ROUNDING * max(abs(left), abs(right)) if allowed > 0 else 0.0
    return difference <= bound and difference < math.inf


@lru_cache
def _as_written(bound: float) -> Fraction:
    """The shortest decimal that reads as this double: the bound that was meant."""
    return Fraction(repr(bound))
