"""Plain numbers, and the text that math-verify is given."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.reward.math_text import prepare_expression, prepare_response
from services.reward.plain_numbers import compare_plainly, parse_plain_number

# (reference, answer, whether they agree; None leaves it to the computer algebra system)
CASES = [
    ("16", "16", True),
    ("16", " 16. ", True),
    ("16", "$16$", True),
    ("16", "+16", True),
    ("16", "016", True),
    ("16", "16.00", True),
    ("0.5", ".5", True),
    ("-3", "-3", True),
    ("0", "-0", True),
    ("16", "17", False),
    ("16", "-16", False),
    ("16", "1 6", None),
    ("16", "1,6", None),
    ("3.14", "3.15", False),
    ("0.333333", "0.3333333", None),
    ("16", "sixteen", None),
    ("16", "", None),
    ("16", "4+12", False),
    ("16", "(4+5)-3+10", False),
    ("16", "4+", False),
    ("16", "2*8", False),
    ("16", "32/2", None),
    ("3.5", "3 1/2", None),
    ("16", "2^4", None),
    ("x+1", "x+1", True),
    ("\\frac{1}{2}", "\\frac{1}{2}", True),
    ("4+12", "16", None),
    ("", "", None),
    ("１６", "16", None),  # full-width digits
]


@pytest.mark.parametrize(("reference", "answer", "expected"), CASES)
def test_plain_numbers(reference: str, answer: str, expected: bool | None) -> None:
    assert compare_plainly(reference, answer) is expected


@settings(deadline=None)
@given(st.integers(-(10**20), 10**20), st.integers(-(10**20), 10**20))
def test_integers_agree_exactly_when_they_are_equal(left: int, right: int) -> None:
    assert compare_plainly(str(left), str(right)) is (left == right)
    assert compare_plainly(str(left), f"{left}.0") is True


@settings(deadline=None)
@given(st.decimals(-(10**6), 10**6, places=4), st.decimals(-(10**6), 10**6, places=4))
def test_decimals_that_are_far_apart_are_decided_exactly(left: Decimal, right: Decimal) -> None:
    found = compare_plainly(f"{left:f}", f"{right:f}")
    assert found is (left == right) or (found is None and abs(left - right) <= abs(left) * Decimal("0.00001"))


@settings(deadline=None)
@given(st.text(max_size=30))
def test_only_numbers_are_read_as_numbers(text: str) -> None:
    number = parse_plain_number(text)
    if number is not None:
        assert Fraction(text) == Fraction(number)


def test_a_number_of_a_million_digits_is_not_converted() -> None:
    assert compare_plainly("16", "9" * 1_000_000) is None


@pytest.mark.parametrize(
    ("text", "prepared"),
    [
        ("2x+1", "$2x+1$"),
        ("$2x+1$", "$2x+1$"),
        ("\\boxed{3}", "\\boxed{3}"),
        ("3 1/2", "$3\\frac{1}{2}$"),
        ("1e5", "$1 \\times 10^{5}$"),
        ("2.5e-3", "$2.5 \\times 10^{-3}$"),
        ("√2", "$\\sqrt 2$"),
        ("sqrt(2)/pi", "$\\sqrt{2}/\\pi $"),
        ("16 apples", "16 apples"),
        ("2x+1 apples", "$2x+1 apples$"),
    ],
)
def test_expressions_are_put_between_dollar_signs(text: str, prepared: str) -> None:
    assert prepare_expression(text) == prepared


def test_a_whole_response_is_searched_unless_it_is_an_expression() -> None:
    assert prepare_response("2x+1") == "$2x+1$"
    prose = "First we add.\nSo the answer is 7."
    assert prepare_response(prose) == prose
