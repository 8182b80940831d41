"""When two outputs count as the same: the comparisons of the sandbox's contract, for outputs that are at hand."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable

# Called with an output and the expected one.
Comparison = Callable[[bytes, bytes], bool]

_NUMBER = re.compile(rb"[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|inf(?:inity)?|nan)", re.IGNORECASE)


def same_bytes(actual: bytes, expected: bytes) -> bool:
    """Byte for byte."""
    return actual == expected


def same_tokens(actual: bytes, expected: bytes) -> bool:
    """The same words, however they are spaced."""
    return actual.split() == expected.split()


def same_lines(actual: bytes, expected: bytes) -> bool:
    """The same lines, but for white space at their ends and empty lines at the end."""
    return _lines(actual) == _lines(expected)


def same_unordered_lines(actual: bytes, expected: bytes) -> bool:
    """The same lines in any order."""
    return Counter(_lines(actual)) == Counter(_lines(expected))


def same_unordered_tokens(actual: bytes, expected: bytes) -> bool:
    """The same words in any order."""
    return Counter(actual.split()) == Counter(expected.split())


def same_floats(absolute: float, relative: float) -> Comparison:
    """Numbers within either tolerance of the expected ones; other words must be the same."""

    def same(actual: bytes, expected: bytes) -> bool:
        words, expected_words = actual.split(), expected.split()
        return len(words) == len(expected_words) and all(
            word == expected_word or _is_near(word, expected_word, absolute, relative)
            for word, expected_word in zip(words, expected_words, strict=True)
        )

    return same


def _lines(output: bytes) -> list[bytes]:
    lines = [line.rstrip() for line in output.split(b"\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _is_near(word: bytes, expected_word: bytes, absolute: float, relative: float) -> bool:
    if not (_NUMBER.fullmatch(word) and _NUMBER.fullmatch(expected_word)):
        return False
    actual, expected = float(word), float(expected_word)
    if math.isnan(actual) or math.isnan(expected):
        return math.isnan(actual) and math.isnan(expected)
    if math.isinf(actual) or math.isinf(expected):
        return actual == expected
    return abs(actual - expected) <= max(absolute, relative * abs(expected))
