"""Comparison of outputs and results with expected ones, out of every program's reach.

Operations on every word run in C, a block at a time, so that large outputs take little time and, in order, little
memory; only words that differ within a tolerance are compared one by one.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from functools import lru_cache
from itertools import chain, compress, count, starmap, zip_longest
from operator import ne
from typing import Any

_ROUNDING = 2 * sys.float_info.epsilon
_MAX_DIGITS = 4300
"""Digits of the longest integer that is read as one: Python's own limit, so that reading stays linear in practice."""
_SIGNS = (b"+", b"-")


@dataclass(frozen=True)
class Tolerance:
    """Tolerance of numbers: one passes when it is within either.

    Raises ValueError unless both are finite and not negative.
    """

    absolute: float = 0.0
    relative: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("absolute", self.absolute), ("relative", self.relative)):
            if not 0 <= value < math.inf:
                raise ValueError(f"the {name} tolerance must be finite and not negative, got {value}")


def read_number(word: bytes) -> int | float | None:
    """Reads the number that a word spells; None when it spells none.

    Decimal integers and decimal fractions with or without exponent, nan, inf and infinity; not the hexadecimal and
    underscored forms of programming languages. One that is too large for a double, or has more than 4,300 digits, is
    no number either: it would equal every other one that is too large.
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
    """Returns whether a number is as expected, by testlib's doubleCompare: within either tolerance, nan only for nan
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
    """Returns the shortest decimal that reads as this double: the bound that was meant."""
    return Fraction(repr(bound))


_BLOCK_BYTES = 1 << 20
_SPACE = re.compile(rb"[ \t\n\r\v\f]")
_NEWLINE = re.compile(rb"\n")
_SHOWN = 80
_SHOWN_BEFORE = 30
_UTF8_BYTES = 4

Items = Callable[[bytes], Iterator[bytes]]
Pair = tuple[bytes | None, bytes | None]


def read_words(output: bytes) -> Iterator[bytes]:
    """Returns the words between white space."""
    return chain.from_iterable(block.split() for block in _blocks(output, _SPACE))


def read_raw_lines(output: bytes) -> Iterator[bytes]:
    """Returns the lines between newlines, which joined by newlines are the output again."""
    return chain.from_iterable(block.split(b"\n") for block in _blocks(output, _NEWLINE))


def read_lines(output: bytes) -> Iterator[bytes]:
    """Returns the lines without white space at their ends, up to the last that is not empty."""
    return map(bytes.rstrip, read_raw_lines(output.rstrip()))


def read_filled_lines(output: bytes) -> Iterator[bytes]:
    """Returns such lines without the empty ones."""
    return filter(None, read_lines(output))


def _blocks(output: bytes, separator: re.Pattern[bytes]) -> Iterator[bytes]:
    """Yields the output in blocks that end before a separator, which is in no block."""
    start = 0
    while (cut := separator.search(output, start + _BLOCK_BYTES)) is not None:
        yield output[start : cut.start()]
        start = cut.end()
    yield output[start:]


def find_in_order(actual: bytes, expected: bytes, items: Items, name: str) -> str | None:
    """Describes the first item that is not the expected one at its position."""
    for index, pair in _differing(actual, expected, items):
        return _describe(name, index, *pair)
    return None


def find_beyond_tolerance(actual: bytes, expected: bytes, tolerance: Tolerance) -> str | None:
    """Describes the first word that is neither the expected one nor a number close to it."""
    for index, (word, expected_word) in _differing(actual, expected, read_words):
        if word is not None and expected_word is not None:
            number, expected_number = read_number(word), read_number(expected_word)
            if number is not None and expected_number is not None and is_close(number, expected_number, tolerance):
                continue
        return _describe("token", index, word, expected_word)
    return None


def find_in_any_order(actual: bytes, expected: bytes, items: Items, name: str) -> str | None:
    """Describes the first item that comes more or less often than it should."""
    missing = Counter(items(expected))
    for item, times in Counter(items(actual)).items():
        expected_times = missing.pop(item, 0)
        if times != expected_times:
            return f"{name} {_show(item)} comes {_times(times)}, expected {_times(expected_times)}"
    for item, expected_times in missing.items():
        return f"{name} {_show(item)} is missing, expected {_times(expected_times)}"
    return None


def _differing(actual: bytes, expected: bytes, items: Items) -> Iterator[tuple[int, Pair]]:
    """Yields the position, from 1 on, and the two items that are not the same; None is beyond the end."""

    def pairs() -> Iterator[Pair]:
        return zip_longest(items(actual), items(expected))

    return compress(zip(count(1), pairs(), strict=False), starmap(ne, pairs()))


def _describe(name: str, index: int, item: bytes | None, expected: bytes | None) -> str:
    if item is None:
        return f"{name} {index} is missing, expected {_show(expected or b'')}"
    if expected is None:
        return f"{name} {index} is {_show(item)}, expected the end"
    start = max(0, _common_bytes(item, expected) - _SHOWN_BEFORE)
    return f"{name} {index} is {_show(item, start)}, expected {_show(expected, start)}"


def _show(item: bytes, start: int = 0) -> str:
    """Quotes an item, cut to 80 characters; `...` replaces the text before `start` and after the cut."""
    if len(item) <= _SHOWN:
        start = 0
    text = item[start : start + _UTF8_BYTES * _SHOWN + 1].decode(errors="replace")
    shown = ("..." if start else "") + text[:_SHOWN] + ("..." if len(text) > _SHOWN else "")
    return json.dumps(shown, ensure_ascii=False)


def _common_bytes(left: bytes, right: bytes) -> int:
    """Returns the length of the common prefix, by bisection."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


Step = tuple[str, Any, Any]


def find_value_difference(actual: Any, expected: Any, tolerance: Tolerance | None = None) -> str | None:
    """Describes the first difference of two JSON values: 1 and 1.0 are equal, True and 1 are not, NaN equals itself.

    Numbers may differ by the tolerance, if given.

    Nesting is bounded by memory alone.
    """
    pending: list[Iterator[Step]] = [iter([("result", actual, expected)])]
    path: list[str] = [""]
    while pending:
        step = next(pending[-1], None)
        if step is None:
            pending.pop()
            path.pop()
            continue
        path[-1], value, expected_value = step
        if (reason := _differ(value, expected_value, tolerance)) is not None:
            return f"{_cut(''.join(path))} {reason}"
        if isinstance(value, dict):
            pending.append(iter([(f"[{_show_json(key)}]", value[key], expected_value[key]) for key in value]))
            path.append("")
        elif isinstance(value, list):
            pending.append((f"[{index}]", *pair) for index, pair in enumerate(zip(value, expected_value, strict=True)))
            path.append("")
    return None


def _differ(actual: Any, expected: Any, tolerance: Tolerance | None) -> str | None:
    """Describes the difference of two values without their items; None when there is none."""
    if isinstance(actual, bool) or isinstance(expected, bool):
        same = actual is expected
    elif isinstance(actual, int | float) and isinstance(expected, int | float):
        if tolerance is None:
            same = actual == expected or (actual != actual and expected != expected)
        else:
            same = is_close(actual, expected, tolerance)
    elif isinstance(actual, list) and isinstance(expected, list):
        if len(actual) != len(expected):
            return f"has {len(actual)} items, expected {len(expected)}"
        return None
    elif isinstance(actual, dict) and isinstance(expected, dict):
        for key in expected:
            if key not in actual:
                return f"lacks the key {_show_json(key)}"
        for key in actual:
            if key not in expected:
                return f"has the key {_show_json(key)}, which is not expected"
        return None
    else:
        same = type(actual) is type(expected) and bool(actual == expected)
    return None if same else f"is {_show_json(actual)}, expected {_show_json(expected)}"


def _show_json(value: Any) -> str:
    """Returns a value as JSON, and only the kind of a list or an object, which may be large or deep."""
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    return _cut(json.dumps(value[: _SHOWN + 1] if isinstance(value, str) else value, ensure_ascii=False))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


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
    """Comparison of outputs; the names are those of the protocol."""

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


def find_difference(actual: bytes, expected: bytes, comparator: Comparison | Tolerance) -> str | None:
    """Describes why an output is not the expected one, such as `token 3 is "7", expected "8"`; None when it is.

    Both outputs are compared to their ends. With a tolerance, words that are numbers may differ by it and all others
    must be the same. An output of 10 MB takes from a tenth of a second to two: call it off the event loop.
    """
    if actual == expected:
        return None
    if isinstance(comparator, Tolerance):
        return find_beyond_tolerance(actual, expected, comparator)
    if comparator in _ORDERED:
        return find_in_order(actual, expected, *_ORDERED[comparator])
    return find_in_any_order(actual, expected, *_UNORDERED[comparator])


def find_result_difference(actual: bytes, expected: Any, tolerance: Tolerance | None = None) -> str | None:
    """Describes why a function's JSON result is not the expected value; None when it is."""
    try:
        value = json.loads(actual)
    except (ValueError, RecursionError) as error:
        return f"result is not JSON: {error}"
    return find_value_difference(value, expected, tolerance)


def same_tokens(actual: bytes, expected: bytes) -> bool:
    """Returns whether both outputs hold the same words, whatever the white space."""
    return find_difference(actual, expected, Comparison.TOKENS) is None


def same_json(actual: Any, expected: Any, tolerance: Tolerance | None = None) -> bool:
    """Returns whether two JSON values are equal: 1 and 1.0 are, True and 1 are not, NaN equals itself."""
    return find_value_difference(actual, expected, tolerance) is None


def same_json_text(actual: bytes, expected: Any, tolerance: Tolerance | None = None) -> bool:
    """Returns whether a program's JSON is the expected value; malformed JSON is not."""
    return find_result_difference(actual, expected, tolerance) is None
