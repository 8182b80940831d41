"""Outputs of programs as sequences or collections of words or lines.

What happens to every word happens in C, a block at a time, so that large outputs take little time and, in order, little
memory beside themselves; only words that differ within a tolerance are looked at one by one.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, compress, count, starmap, zip_longest
from operator import ne

from perigee.sandbox.comparisons.numbers import Tolerance, is_close, read_number

_BLOCK_BYTES = 1 << 20
_SPACE = re.compile(rb"[ \t\n\r\v\f]")
_NEWLINE = re.compile(rb"\n")
_SHOWN = 80
_SHOWN_BEFORE = 30
_UTF8_BYTES = 4

Items = Callable[[bytes], Iterator[bytes]]
Pair = tuple[bytes | None, bytes | None]


def read_words(output: bytes) -> Iterator[bytes]:
    """What stands between white space."""
    return chain.from_iterable(block.split() for block in _blocks(output, _SPACE))


def read_raw_lines(output: bytes) -> Iterator[bytes]:
    """What stands between newlines; joined by newlines it is the output again."""
    return chain.from_iterable(block.split(b"\n") for block in _blocks(output, _NEWLINE))


def read_lines(output: bytes) -> Iterator[bytes]:
    """Lines without the white space at their ends, up to the last that is not empty."""
    return map(bytes.rstrip, read_raw_lines(output.rstrip()))


def read_filled_lines(output: bytes) -> Iterator[bytes]:
    """The same without empty lines: out of order, none is the last."""
    return filter(None, read_lines(output))


def _blocks(output: bytes, separator: re.Pattern[bytes]) -> Iterator[bytes]:
    """The output in blocks that end before a separator, which belongs to neither side."""
    start = 0
    while (cut := separator.search(output, start + _BLOCK_BYTES)) is not None:
        yield output[start : cut.start()]
        start = cut.end()
    yield output[start:]


def find_in_order(actual: bytes, expected: bytes, items: Items, name: str) -> str | None:
    """The first item that is not the expected one in its place, as a sentence."""
    for index, pair in _differing(actual, expected, items):
        return _describe(name, index, *pair)
    return None


def find_beyond_tolerance(actual: bytes, expected: bytes, tolerance: Tolerance) -> str | None:
    """The first word that is neither the expected one nor a number close to it, as a sentence."""
    for index, (word, expected_word) in _differing(actual, expected, read_words):
        if word is not None and expected_word is not None:
            number, expected_number = read_number(word), read_number(expected_word)
            if number is not None and expected_number is not None and is_close(number, expected_number, tolerance):
                continue
        return _describe("token", index, word, expected_word)
    return None


def find_in_any_order(actual: bytes, expected: bytes, items: Items, name: str) -> str | None:
    """An item that comes more or less often than it should, as a sentence; the first one of either output."""
    missing = Counter(items(expected))
    for item, times in Counter(items(actual)).items():
        expected_times = missing.pop(item, 0)
        if times != expected_times:
            return f"{name} {_show(item)} comes {_times(times)}, expected {_times(expected_times)}"
    for item, expected_times in missing.items():
        return f"{name} {_show(item)} is missing, expected {_times(expected_times)}"
    return None


def _differing(actual: bytes, expected: bytes, items: Items) -> Iterator[tuple[int, Pair]]:
    """Position, from 1 on, and the two items wherever they are not the same; None stands past the end."""

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
    """The item in quotes, cut to 80 characters; `...` stands for what is before `start` and after the cut."""
    if len(item) <= _SHOWN:
        start = 0
    text = item[start : start + _UTF8_BYTES * _SHOWN + 1].decode(errors="replace")
    shown = ("..." if start else "") + text[:_SHOWN] + ("..." if len(text) > _SHOWN else "")
    return json.dumps(shown, ensure_ascii=False)


def _common_bytes(left: bytes, right: bytes) -> int:
    """How many bytes the two begin with in common, by halving."""
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
