"""Compares single expressions with math-verify and SymPy; beside `free_symbols` the only module that imports them.

Values are compared at points, where one number with thirty digits tells more than a simplification does, and by
math-verify where that gives no number. A difference of zero is not proved by points, but two answers that agree in
thirty digits at five points are the same function for all that answers ask.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import verify

from services.reward.mathematics.families import Family
from services.reward.mathematics.free_symbols import equal_up_to_constants, families_agree, has_constant
from services.reward.mathematics.normalise import squeeze
from services.reward.mathematics.numbers import Number, numbers_agree, read_number
from services.reward.mathematics.shapes import REVERSED, Relation
from services.reward.mathematics.words import words_agree

CONVERSION = ConversionConfig(interpret_as_mixed_fractions=False)
LATEX = {
    "*": "\\cdot ",
    "±": "\\pm ",
    "≤": "\\le ",
    "≥": "\\ge ",
    "≠": "\\ne ",
    "≈": "=",
    "∈": "\\in ",
    "∪": "\\cup ",
    "∩": "\\cap ",
    "∞": "\\infty ",
    "∅": "\\emptyset ",
    "ℝ": "\\mathbb{R}",
    "⦃": "\\{",
    "⦄": "\\}",
    "⟨": "(",
    "⟩": ")",
}
# The letter i is the imaginary unit, but for the index of a sum.
IMAGINARY = sympy.Symbol("i", real=True)
DIGITS = 30
TOLERANCE = sympy.Float("1e-15", DIGITS)
# No pattern is common to them, and each is near 1, where logarithms, roots and powers are defined and tame.
POINTS = tuple(Fraction(number, 997) for number in (613, 1171, 877, 1549, 1283, 709, 1871, 1103))
LEAST_POINTS = 2
PARSER_ERRORS = (
    *(ValueError, TypeError, SyntaxError, AttributeError, KeyError, IndexError, NotImplementedError),
    RecursionError,  # brackets deeper than anybody writes them
)
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{4,}(?![A-Za-z])")
ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[a-z]+\}")


class UnreadableError(ValueError):
    """An expression that is no mathematics; `is_reference` tells whose."""

    def __init__(self, text: str, *, is_reference: bool) -> None:
        super().__init__(f"{text[:100]!r} is not mathematics that can be read")
        self.is_reference = is_reference


class SympyAlgebra:
    """Equality of expressions by value, of relations by their solutions.

    All methods raise UnreadableError, and whatever SymPy raises.
    """

    def equal(self, expected: str, found: str) -> bool:
        """Whether two expressions have the same value, or the same symbols."""
        if squeeze(expected) == squeeze(found):
            return True
        if has_words(expected):
            return words_agree(expected, found)
        wanted = parse_reference(expected)
        given = parse(found, is_reference=False)
        decimal = compare_decimals(expected, wanted, found, given)
        if decimal is not None:
            return decimal
        by_value = compare_by_value(wanted, given)
        if by_value is False:
            return has_constant(expected) and equal_up_to_constants(wanted, given, compare_by_value)
        if by_value is not None:
            return by_value
        return bool(verify([wanted], [given], timeout_seconds=None, raise_on_error=True))

    def same_relation(self, expected: Relation, found: Relation) -> bool:
        """Whether two equations are multiples of each other, or two inequalities have the same solutions."""
        if expected.sign != found.sign and "=" in (expected.sign, found.sign):
            return False
        wanted, given = difference(expected, is_reference=True), difference(found, is_reference=False)
        ratio = None if wanted is None or given is None else ratio_of(wanted, given)
        if ratio is not None:
            sign = found.sign if expected.sign in "=≠" or ratio > 0 else REVERSED.get(found.sign)
            return bool(ratio) and expected.sign == sign
        sides = [f"{relation.left}{relation.sign}{relation.right}" for relation in (expected, found)]
        wanted, given = parse_reference(sides[0]), parse(sides[1], is_reference=False)
        return bool(verify([wanted], [given], timeout_seconds=None, raise_on_error=True))

    def same_family(self, expected: Family, found: Family) -> bool:
        """Whether two families have the same members, whatever their parameters are called."""

        def parse_part(text: str, is_reference: bool) -> Any:
            return parse(text, is_reference=is_reference)

        return families_agree(expected, found, parse_part, compare_by_value)


@lru_cache(maxsize=512)
def parse_reference(text: str) -> Any:
    """The reference, parsed once for the group of responses that share it."""
    return parse(text, is_reference=True)


def parse(text: str, *, is_reference: bool) -> Any:
    """A SymPy object.

    Raises UnreadableError.
    """
    number = read_number(text)
    if number is not None and not number.is_decimal:
        return sympy.Rational(number.value)
    if has_words(text) or not text.strip():
        raise UnreadableError(text, is_reference=is_reference)
    latex = to_latex(text)
    try:
        parsed = latex2sympy(
            latex,
            is_real=True,
            convert_degrees=False,
            normalization_config=None,
            conversion_config=CONVERSION,
        )
    except PARSER_ERRORS as error:
        raise UnreadableError(text, is_reference=is_reference) from error
    except Exception as error:  # the parser's own errors are bare exceptions
        if type(error) is not Exception:
            raise
        raise UnreadableError(text, is_reference=is_reference) from error
    if parsed is None:
        raise UnreadableError(text, is_reference=is_reference)
    return parsed.subs(IMAGINARY, sympy.I) if IMAGINARY in getattr(parsed, "free_symbols", ()) else parsed


def has_words(text: str) -> bool:
    """Whether prose is in a text, which no algebra reads."""
    return WORD.search(ENVIRONMENT.sub("", text)) is not None


def to_latex(text: str) -> str:
    """The notation of `normalise` as LaTeX."""
    text = re.sub(r"(?<=[0-9)}])\s*°", r" \\cdot \\frac{\\pi}{180} ", text)
    text = re.sub(r"(?<=[0-9])\\frac", r" \\cdot \\frac", text)
    text = re.sub(r"(?<![_^][0-9])(?<=[0-9])\s*\(", r" \\cdot (", text)
    text = re.sub(r"\\(?:ln|log)\s*\{", lambda match: match[0].rstrip("{") + " {", text)
    return "".join(LATEX.get(character, character) for character in text)


def compare_decimals(expected: str, wanted: Any, found: str, given: Any) -> bool | None:
    """A decimal against an expression without variables; None where neither is a decimal."""
    numbers = read_number(expected), read_number(found)
    if not any(number is not None and number.is_decimal for number in numbers):
        return None
    values = [value_of(expression) for expression in (wanted, given)]
    if values[0] is None or values[1] is None or not (values[0].is_real and values[1].is_real):
        return None
    exact = [number or Number(Fraction(str(value))) for number, value in zip(numbers, values, strict=True)]
    return numbers_agree(exact[0], exact[1])


def value_of(expression: Any) -> Any:
    """The number that an expression without variables is, to thirty digits; None where it is none."""
    if not isinstance(expression, sympy.Expr) or expression.free_symbols:
        return None
    value = expression.doit().evalf(DIGITS, maxn=200)
    return value if value.is_number and value.is_finite else None


def compare_by_value(wanted: Any, given: Any) -> bool | None:
    """Whether two expressions have the same values; None where there are no numbers to compare."""
    if not isinstance(wanted, sympy.Expr) or not isinstance(given, sympy.Expr):
        return None
    if wanted == given:
        return True
    wanted, given = wanted.doit(), given.doit()
    symbols = sorted(wanted.free_symbols | given.free_symbols, key=str)
    pairs = list(values_at_points(symbols, wanted, given))
    if len(pairs) < (LEAST_POINTS if symbols else 1):
        return None
    return all(abs(left - right) <= TOLERANCE * (1 + abs(left)) for left, right in pairs)


def values_at_points(symbols: list[Any], wanted: Any, given: Any) -> Any:
    """Pairs of finite values; where both are undefined there is none."""
    shifts = (0,) if not symbols else (0, 1, 2, 3, 4)
    for shift in shifts:
        sign = -1 if shift >= 3 else 1
        point = {
            symbol: sign * sympy.Rational(POINTS[(index + shift) % len(POINTS)]) for index, symbol in enumerate(symbols)
        }
        values = [expression.subs(point).evalf(DIGITS, maxn=200) for expression in (wanted, given)]
        if not all(value.is_number and value.is_finite for value in values):
            continue
        if sign < 0 and not all(value.is_real for value in values):
            continue  # roots and logarithms of negative numbers: which branch is meant is not said
        yield values[0], values[1]


def difference(relation: Relation, *, is_reference: bool) -> Any:
    """Left side less right side; None where they are no expressions."""
    left, right = parse(relation.left, is_reference=is_reference), parse(relation.right, is_reference=is_reference)
    return left - right if isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr) else None


def ratio_of(wanted: Any, given: Any) -> Any:
    """The number that one expression is of the other, 0 where there is none; None where points tell nothing."""
    symbols = sorted(wanted.free_symbols | given.free_symbols, key=str)
    pairs = list(values_at_points(symbols, wanted, given))
    if len(pairs) < LEAST_POINTS or any(left == 0 or right == 0 for left, right in pairs):
        return None
    ratios = [left / right for left, right in pairs]
    first = ratios[0]
    is_same = first.is_real and all(abs(ratio - first) <= TOLERANCE * (1 + abs(first)) for ratio in ratios)
    return first if is_same else sympy.Integer(0)
