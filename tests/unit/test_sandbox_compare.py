"""Comparison of outputs and of JSON values."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from perigee.sandbox import compare
from perigee.sandbox.compare import (
    Comparison,
    Tolerance,
    find_difference,
    find_result_difference,
    read_number,
    same_json,
    same_json_text,
    same_tokens,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
OUTPUTS = st.text(alphabet="ab1 \n\t\r", max_size=30).map(str.encode)
EXACT, TOKENS, LINES = Comparison.EXACT, Comparison.TOKENS, Comparison.LINES
UNORDERED_LINES, UNORDERED_TOKENS = Comparison.UNORDERED_LINES, Comparison.UNORDERED_TOKENS
MICRO = Tolerance(absolute=1e-6, relative=1e-6)


@settings(deadline=None)
@given(JSON)
def test_a_value_equals_itself_through_json(value: Any) -> None:
    assert same_json_text(json.dumps(value).encode(), value)
    assert same_json(value, value, Tolerance())


@settings(deadline=None)
@given(JSON, JSON)
def test_comparison_is_symmetric_and_agrees_with_equality(left: Any, right: Any) -> None:
    assert same_json(left, right) == same_json(right, left)
    if same_json(left, right) and "NaN" not in json.dumps([left, right]):
        assert left == right


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        (1, 1.0, True),
        (True, 1, False),
        (0, False, False),
        (None, 0, False),
        ("1", 1, False),
        ([1, [True]], [1, [1]], False),
        ({"a": 1}, {"a": 1.0}, True),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ([], {}, False),
        ([1, 2], [1], False),
        ([1], [1, 2], False),
        (2**70, 2**70, True),
        (2**70 + 1, 2**70, False),
        (2**53 + 1, float(2**53), False),
        (float("nan"), float("nan"), True),
        (0.1 + 0.2, 0.3, False),
    ],
)
def test_json_pairs(left: Any, right: Any, same: bool) -> None:
    assert same_json(left, right) is same


@pytest.mark.parametrize("text", [b"", b"{", b"nul", b"[" * 100_000, b"\xff", b"9" * 5000])
def test_text_that_is_not_json_is_not_the_value(text: bytes) -> None:
    assert not same_json_text(text, None)
    assert (find_result_difference(text, None) or "").startswith("result is not JSON: ")


def test_json_numbers_within_a_tolerance() -> None:
    assert same_json([0.1 + 0.2, {"a": 1000001}], [0.3, {"a": 1000000}], MICRO)
    assert not same_json([0.1 + 0.2], ["0.3"], MICRO)
    assert not same_json(True, 1, Tolerance(absolute=5))
    assert not same_json(None, 0.0, Tolerance(absolute=5))
    assert same_json(math.nan, math.nan, MICRO)
    assert not same_json(math.nan, 0.0, MICRO)
    assert not same_json(10**400, 1.0, MICRO)


@pytest.mark.parametrize(
    ("actual", "expected", "reason"),
    [
        ([1, {"a": [2, 3]}], [1, {"a": [2, 4]}], 'result[1]["a"][1] is 3, expected 4'),
        ([[1], [2], [3]], [[1], [5], [6]], "result[1][0] is 2, expected 5"),
        ([1], [1, 2], "result has 1 items, expected 2"),
        ({"a": 1}, {"b": 1}, 'result lacks the key "b"'),
        ({"a": 1, "b": 1}, {"b": 1}, 'result has the key "a", which is not expected'),
        (None, [1], "result is null, expected a list"),
        ("x" * 100, {}, f'result is "{"x" * 79}..., expected an object'),
    ],
)
def test_the_first_difference_of_json_values_is_reported(actual: Any, expected: Any, reason: str) -> None:
    assert find_result_difference(json.dumps(actual).encode(), expected) == reason


def test_json_values_nested_as_deep_as_they_parse() -> None:
    depth = 900
    text = b"[" * depth + b"1" + b"]" * depth
    assert same_json_text(text, json.loads(text))
    reason = find_result_difference(text, json.loads(text.replace(b"1", b"2")))
    assert reason is not None
    assert reason.endswith("is 1, expected 2")
    assert len(reason) < 200


@pytest.mark.parametrize(
    ("actual", "expected", "same"),
    [
        (b" 1  2\n", b"1 2", True),
        (b"1 2", b"12", False),
        (b"1", b"1 2", False),
        (b"1 2 3", b"1 2", False),
        (b"", b"\n", True),
        (b"\xff", b"\xff", True),
    ],
)
def test_tokens(actual: bytes, expected: bytes, same: bool) -> None:
    assert same_tokens(actual, expected) is same


@pytest.mark.parametrize(
    ("comparator", "actual", "expected", "reason"),
    [
        (EXACT, b"1\n2\n", b"1\n2\n", None),
        (EXACT, b"1\n2", b"1\n2\n", 'line 3 is missing, expected ""'),
        (EXACT, b"1\r\n", b"1\n", r'line 1 is "1\r", expected "1"'),
        (EXACT, b"", b"x", 'line 1 is "", expected "x"'),
        (TOKENS, b"5 6\n7", b"5 6\n8", 'token 3 is "7", expected "8"'),
        (TOKENS, b"5 6", b"5", 'token 2 is "6", expected the end'),
        (TOKENS, b"5", b"5 6", 'token 2 is missing, expected "6"'),
        (TOKENS, b"", b"5", 'token 1 is missing, expected "5"'),
        (TOKENS, b"1.0", b"1", 'token 1 is "1.0", expected "1"'),
        (LINES, b"a b \t\r\n\n c\n\n\n", b"a b\n\n c", None),
        (LINES, b"a  b", b"a b", 'line 1 is "a  b", expected "a b"'),
        (LINES, b" a", b"a", 'line 1 is " a", expected "a"'),
        (LINES, b"a\n\nb", b"a\nb", 'line 2 is "", expected "b"'),
        (LINES, b"\n\n", b"", None),
        (LINES, b"a\nb\n", b"a", 'line 2 is "b", expected the end'),
        (UNORDERED_LINES, b"b 1\na\n\n", b"a \n\nb 1", None),
        (UNORDERED_LINES, b"1 b\na", b"a\nb 1", 'line "1 b" comes once, expected 0 times'),
        (UNORDERED_LINES, b"a", b"a\na", 'line "a" comes once, expected 2 times'),
        (UNORDERED_TOKENS, b"2 1\n2", b"2 2 1", None),
        (UNORDERED_TOKENS, b"1 1 2", b"1 2 2", 'token "1" comes 2 times, expected once'),
        (UNORDERED_TOKENS, b"1", b"1 2", 'token "2" is missing, expected once'),
        (UNORDERED_TOKENS, b"", b"", None),
        (TOKENS, b"\xff\x00", b"a", 'token 1 is "\N{REPLACEMENT CHARACTER}\\u0000", expected "a"'),
    ],
)
def test_the_first_difference_is_reported(
    comparator: Comparison, actual: bytes, expected: bytes, reason: str | None
) -> None:
    assert find_difference(actual, expected, comparator) == reason


def test_long_words_are_cut_where_they_differ() -> None:
    reason = find_difference(b"x" * 1000 + b"1" + b"y" * 1000, b"x" * 1000 + b"2", TOKENS)
    assert reason == f'token 1 is "...{"x" * 30}1{"y" * 49}...", expected "...{"x" * 30}2"'
    reason = find_difference("é".encode() * 1000, b"2", TOKENS)
    assert reason == f'token 1 is "{"é" * 80}...", expected "2"'


@settings(deadline=None)
@given(OUTPUTS, OUTPUTS, st.integers(1, 5))
def test_blocks_do_not_show(actual: bytes, expected: bytes, block_bytes: int) -> None:
    """Every comparison against its definition, with blocks of a few bytes."""

    def lines(output: bytes) -> list[bytes]:
        return [line.rstrip() for line in output.rstrip().split(b"\n")]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "_BLOCK_BYTES", block_bytes)
        same = {comparator: find_difference(actual, expected, comparator) is None for comparator in Comparison}
        close = find_difference(actual, expected, Tolerance()) is None
    assert same == {
        EXACT: actual == expected,
        TOKENS: actual.split() == expected.split(),
        LINES: lines(actual) == lines(expected),
        UNORDERED_LINES: sorted(filter(None, lines(actual))) == sorted(filter(None, lines(expected))),
        UNORDERED_TOKENS: sorted(actual.split()) == sorted(expected.split()),
    }
    numbers = [[read_number(word) or word for word in output.split()] for output in (actual, expected)]
    assert close == (numbers[0] == numbers[1])


@pytest.mark.parametrize("comparator", [*Comparison, MICRO])
@settings(deadline=None)
@given(words=st.lists(st.sampled_from([b"a", b"1", b"2.5", b"nan"]), min_size=1, max_size=6), data=st.data())
def test_neither_a_prefix_nor_an_extension_passes(
    comparator: Comparison | Tolerance, words: list[bytes], data: Any
) -> None:
    shorter = words[: data.draw(st.integers(0, len(words) - 1))]
    long, short = b"\n".join(words), b"\n".join(shorter)
    assert find_difference(short, long, comparator) is not None
    assert find_difference(long, short, comparator) is not None


@pytest.mark.parametrize(
    ("actual", "expected", "tolerance", "same"),
    [
        (b"0.3333333", b"0.333333333", MICRO, True),
        (b"0.3333", b"0.333333333", MICRO, False),
        (b"1000001", b"1000000", Tolerance(relative=1e-6), True),
        (b"1000001", b"1000000", Tolerance(absolute=1e-6), False),
        (b"1.1", b"1", Tolerance(absolute=0.1), True),  # the bound itself, in spite of rounding
        (b"1.1000001", b"1", Tolerance(absolute=0.1), False),
        (b"1e-18", b"0", Tolerance(absolute=1e-20), False),
        (b"-0.0", b"0", Tolerance(), True),
        (b"0.30000000000000004", b"0.3", Tolerance(), False),
        (b"7", b"+007.0", Tolerance(), True),
        (b"9007199254740993", b"9007199254740992", Tolerance(), False),
        (b"9007199254740993", b"9007199254740993.0", Tolerance(), True),
        (b"9007199254740993", b"9007199254740992", Tolerance(absolute=0.5), False),
        (b"9007199254740993", b"9007199254740992", Tolerance(absolute=1), True),
        (b"1" + b"0" * 400, b"1" + b"0" * 399 + b"1", MICRO, True),
        (b"1" + b"0" * 400, b"2" + b"0" * 400, MICRO, False),
        (b"1" + b"0" * 400, b"1" + b"0" * 401, MICRO, False),
        (b"1" + b"0" * 5000, b"1" + b"0" * 5001, MICRO, False),
        (b"1e999", b"1e998", MICRO, False),
        (b"1e999", b"inf", MICRO, False),
        (b"1e308", b"-1e308", Tolerance(relative=1), False),
        (b"nan", b"NaN", MICRO, True),
        (b"nan", b"1", Tolerance(absolute=1e300), False),
        (b"1", b"nan", Tolerance(absolute=1e300), False),
        (b"inf", b"Infinity", MICRO, True),
        (b"-inf", b"inf", MICRO, False),
        (b"1e308", b"inf", Tolerance(relative=1e300), False),
        (b"inf", b"1e308", Tolerance(relative=1e300), False),
        (b"1_0", b"10", MICRO, False),
        (b"1_0", b"1_0", MICRO, True),
        (b"0x10", b"16", MICRO, False),
        (b"0x1p4", b"16", MICRO, False),
        (b"1,5", b"1.5", MICRO, False),
        (b"yes 0.5", b"yes 0.5000001", MICRO, True),
        (b"Yes 0.5", b"yes 0.5", MICRO, False),
    ],
)
def test_numbers(actual: bytes, expected: bytes, tolerance: Tolerance, same: bool) -> None:
    assert (find_difference(actual, expected, tolerance) is None) is same


@example(2_246_740_603_612_633, 1, 0.0, 1e-18)
@settings(deadline=None)
@given(st.integers(), st.integers(-3, 3), st.sampled_from([0.0, 1.0, 2.0]), st.sampled_from([0.0, 1e-18, 0.5]))
def test_integers_lose_no_precision(expected: int, step: int, absolute: float, relative: float) -> None:
    actual = expected + step
    within = abs(step) <= absolute or abs(step) <= Fraction(repr(relative)) * abs(expected)
    reason = find_difference(str(actual).encode(), str(expected).encode(), Tolerance(absolute, relative))
    assert (reason is None) == within


@settings(deadline=None)
@given(st.floats(allow_nan=False), st.floats(allow_nan=False), st.floats(0, 1e6), st.floats(0, 1e6))
def test_what_passes_a_tolerance_is_within_it(actual: float, expected: float, absolute: float, relative: float) -> None:
    texts = repr(actual).encode(), repr(expected).encode()
    passes = find_difference(*texts, Tolerance(absolute, relative)) is None
    if math.isinf(actual) or math.isinf(expected):
        assert passes == (actual == expected)
        return
    distance = abs(Fraction(actual) - Fraction(expected))
    bound = max(Fraction(absolute), Fraction(relative) * abs(Fraction(expected)))
    slack = Fraction(2) ** -50 * max(bound, abs(Fraction(actual)), abs(Fraction(expected)))
    if passes:
        assert distance <= bound + slack
    else:
        assert distance > bound - slack or distance > Fraction(1e308)


@pytest.mark.parametrize("values", [(-1.0, 0.0), (0.0, -1e-9), (math.nan, 0.0), (0.0, math.inf)])
def test_a_tolerance_is_finite_and_not_negative(values: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="finite and not negative"):
        Tolerance(*values)
