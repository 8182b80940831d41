"""Compares single expressions with math-verify and SymPy; the only module that imports them.

Integers and fractions are compared exactly. Other values are compared at points, where one number with thirty digits
tells more than a simplification does, and confirmed at one point by the value of their difference, to a precision far
beyond their size. What has no values is left to math-verify.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import verify

from services.reward.math.notation import squeeze
from services.reward.math.numbers import Number, numbers_agree, read_number
from services.reward.math.parse import REVERSED, Relation
from services.reward.math.words import has_words, words_agree

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
TOLERANCE = sympy.Float("1e-25", DIGITS)
# Beyond the size of two values, the digits at which their difference is looked for.
CONFIRMED_DIGITS = 200
CERTAIN_BITS = 8
MAX_CONFIRMED_DIGITS = 5000
# No pattern is common to them, and each is near 1, where logarithms, roots and powers are defined and tame.
POINTS = tuple(Fraction(number, 997) for number in (613, 1171, 877, 1549, 1283, 709, 1871, 1103))
LEAST_POINTS = 2
PARSER_ERRORS = (ValueError, TypeError, SyntaxError, ArithmeticError, AttributeError, LookupError, RuntimeError)


class UnreadableError(ValueError):
    """Text that is no mathematics; `is_reference` tells whose."""

    def __init__(self, text: str, *, is_reference: bool) -> None:
        super().__init__(f"{text[:100]!r} is not mathematics that can be read")
        self.is_reference = is_reference


class SympyAlgebra:
    """Equality of expressions by value, of relations by their solutions.

    All methods raise UnreadableError, and whatever SymPy raises.
    """

    def equal(self, expected: str, found: str) -> bool:
        """Returns whether two expressions have the same value, or the same symbols."""
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
        return verify_equal(wanted, given) if by_value is None else by_value

    def same_relation(self, expected: Relation, found: Relation) -> bool:
        """Returns whether two equations are multiples of each other, or two inequalities have the same solutions."""
        if expected.sign != found.sign and "=" in (expected.sign, found.sign):
            return False
        wanted, given = difference(expected, is_reference=True), difference(found, is_reference=False)
        ratio = None if wanted is None or given is None else ratio_of(wanted, given)
        if ratio is not None:
            sign = found.sign if expected.sign in "=≠" or ratio > 0 else REVERSED.get(found.sign)
            return bool(ratio) and expected.sign == sign
        sides = [f"{relation.left}{relation.sign}{relation.right}" for relation in (expected, found)]
        return verify_equal(parse_reference(sides[0]), parse(sides[1], is_reference=False))


@lru_cache(maxsize=512)
def parse_reference(text: str) -> Any:
    """Parses a reference once for the group of responses that share it."""
    return parse(text, is_reference=True)


def parse(text: str, *, is_reference: bool) -> Any:
    """Parses an expression into a SymPy object.

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
    if not isinstance(parsed, sympy.Basic):
        return parsed
    decimals = {decimal: sympy.Rational(str(decimal)) for decimal in parsed.atoms(sympy.Float) if decimal.is_finite}
    parsed = parsed.xreplace(decimals)
    return parsed.subs(IMAGINARY, sympy.I) if IMAGINARY in parsed.free_symbols else parsed


def to_latex(text: str) -> str:
    """Turns the notation of `normalise` into LaTeX."""
    text = re.sub(r"(?<=[0-9)}])\s*°", r" \\cdot \\frac{\\pi}{180} ", text)
    text = re.sub(r"(?<=[0-9])\\frac", r" \\cdot \\frac", text)
    text = re.sub(r"(?<![_^][0-9])(?<=[0-9])\s*\(", r" \\cdot (", text)
    text = re.sub(r"\\(?:ln|log)\s*\{", lambda match: match[0].rstrip("{") + " {", text)
    return "".join(LATEX.get(character, character) for character in text)


def compare_decimals(expected: str, wanted: Any, found: str, given: Any) -> bool | None:
    """Compares a decimal with an expression without variables; None where neither is a decimal."""
    numbers = read_number(expected), read_number(found)
    if not any(number is not None and number.is_decimal for number in numbers):
        return None
    values = [value_of(expression) for expression in (wanted, given)]
    if values[0] is None or values[1] is None or not (values[0].is_real and values[1].is_real):
        return None
    exact = [number or Number(Fraction(str(value))) for number, value in zip(numbers, values, strict=True)]
    return numbers_agree(exact[0], exact[1])


def value_of(expression: Any) -> Any:
    """Returns the value of an expression without variables to thirty digits; None where it has none."""
    if not isinstance(expression, sympy.Expr) or expression.free_symbols:
        return None
    value = expression.doit().evalf(DIGITS, maxn=200)
    return value if value.is_number and value.is_finite else None


def verify_equal(wanted: Any, given: Any) -> bool:
    """Compares sets, relations and the like by math-verify."""
    return bool(
        verify(
            [wanted],
            [given],
            float_rounding=DIGITS // 2,
            numeric_precision=DIGITS,
            timeout_seconds=None,
            raise_on_error=True,
        )
    )


def compare_by_value(wanted: Any, given: Any) -> bool | None:
    """Returns whether two expressions have the same values; None where they have no numbers to compare."""
    if not isinstance(wanted, sympy.Expr) or not isinstance(given, sympy.Expr):
        return None
    if wanted == given:
        return True
    wanted, given = wanted.doit(), given.doit()
    if wanted.is_Rational and given.is_Rational:
        return bool(wanted == given)
    symbols = sorted(wanted.free_symbols | given.free_symbols, key=str)
    known: list[dict[Any, Any]] = []
    for point, left, right in values_at_points(symbols, wanted, given):
        size = max(abs(left), abs(right))
        is_near = abs(left - right) <= TOLERANCE * size
        if (not is_near or not known) and not is_zero((wanted - given).subs(point), size):
            return False
        known.append(point)
    return True if len(known) >= (LEAST_POINTS if symbols else 1) else None


def is_zero(difference: Any, size: Any) -> bool:
    """Returns whether a difference is zero, as far as a precision far beyond the size of its values can tell."""
    if difference.is_Rational:
        return bool(difference == 0)
    exponent = 0 if size == 0 else abs(int(sympy.log(size, 10).evalf(5)))
    value = difference.evalf(DIGITS, maxn=min(CONFIRMED_DIGITS + exponent, MAX_CONFIRMED_DIGITS))
    # Where terms cancel in all the digits that were tried, not one bit of the rest is certain.
    return all(part == 0 or part._prec < CERTAIN_BITS for part in value.as_real_imag())


def values_at_points(symbols: Sequence[Any], *expressions: Any) -> Iterator[tuple[dict[Any, Any], Any, Any]]:
    """Yields points with the values of two expressions there, where both are defined."""
    for shift in range(5) if symbols else (0,):
        sign = -1 if shift >= 3 else 1
        point = {
            symbol: sign * sympy.Rational(POINTS[(index + shift) % len(POINTS)]) for index, symbol in enumerate(symbols)
        }
        left, right = (expression.subs(point).evalf(DIGITS, maxn=200) for expression in expressions)
        if not all(value.is_number and value.is_finite for value in (left, right)):
            continue
        if sign < 0 and not (left.is_real and right.is_real):
            continue  # roots and logarithms of negative numbers: which branch is meant is not said
        yield point, left, right


def difference(relation: Relation, *, is_reference: bool) -> Any:
    """Returns left side less right side; None where they are no expressions."""
    left, right = parse(relation.left, is_reference=is_reference), parse(relation.right, is_reference=is_reference)
    return left - right if isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr) else None


def ratio_of(wanted: Any, given: Any) -> Any:
    """Returns the constant ratio of two expressions, 0 where it is not constant; None where points tell nothing."""
    symbols = sorted(wanted.free_symbols | given.free_symbols, key=str)
    if wanted == given:
        return sympy.Integer(1)
    points = list(values_at_points(symbols, wanted, given))
    pairs = [(left, right) for _, left, right in points]
    if pairs and (all(left == 0 for left, _ in pairs) or all(right == 0 for _, right in pairs)):
        return sympy.Integer(0)  # one of them says nothing
    if len(pairs) < LEAST_POINTS or any(left == 0 or right == 0 for left, right in pairs):
        return None
    ratios = [left / right for left, right in pairs]
    first = ratios[0]
    is_same = first.is_real and all(abs(ratio - first) <= TOLERANCE * abs(first) for ratio in ratios)
    if not is_same:
        return sympy.Integer(0)
    exact = wanted.subs(points[0][0]) / given.subs(points[0][0])
    rest = (wanted - exact * given).subs(points[1][0])
    return first if is_zero(rest, abs(pairs[1][0])) else sympy.Integer(0)
