"""Whether two single values agree, with their units, per cent signs, ratios and bases."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Protocol

from services.reward.mathematics.numbers import Number, is_unevaluated, numbers_agree, read_number
from services.reward.mathematics.quantities import (
    DEGREES,
    RADIANS,
    Quantity,
    clocks_agree,
    read_clock,
    read_quantity,
)
from services.reward.mathematics.units import NAMES

HUNDRED = Fraction(100)
RATIO = re.compile(r"[^:]+(?::[^:]+)+")
# "37.5L" where a number is expected; where an expression is, "2m" is two times m.
LETTER_UNIT = re.compile(r"([+-]?[0-9.]+)([mgLlshtVWNJ])")
DIGITS = re.compile(r"[0-9A-Z]+")
BASED = re.compile(r"([0-9A-Z]+)_\{?([0-9]+)\}?")


class Equality(Protocol):
    """What compares single expressions."""

    def equal(self, expected: str, found: str) -> bool:
        """Whether two expressions have the same value."""


def scalars_agree(expected: str, found: str, algebra: Equality) -> bool:
    """Whether two normalised texts are the same value."""
    clocks = read_clock(expected), read_clock(found)
    if clocks[0] is not None and clocks[1] is not None and (clocks[0].half or clocks[1].half):
        return clocks_agree(clocks[0], clocks[1])
    if RATIO.fullmatch(expected) or RATIO.fullmatch(found):
        return ratios_agree(expected, found, algebra)
    based = BASED.fullmatch(expected), BASED.fullmatch(found)
    if based[0] and (based[1] or DIGITS.fullmatch(found) or read_number(found)):
        return (based[0][1], based[0][2]) == (based[1][1], based[1][2]) if based[1] else based[0][1] == found
    if based[0] and re.search(r"[0-9]", based[0][1]):
        return False
    return quantities_agree(read_quantity(expected), read_quantity(found), algebra)


def ratios_agree(expected: str, found: str, algebra: Equality) -> bool:
    """The same numbers in the same order; a ratio of two may be written as a fraction."""
    left, right = expected.split(":"), found.split(":")
    if len(left) == len(right):
        return all(scalars_agree(a.strip(), b.strip(), algebra) for a, b in zip(left, right, strict=True))
    if {len(left), len(right)} != {1, 2}:
        return False
    pair, single = (left, found) if len(left) == 2 else (right, expected)
    numbers = [read_number(part) for part in pair]
    value = read_number(single)
    if numbers[0] is None or numbers[1] is None or value is None or numbers[1].value == 0:
        return False
    return numbers[0].value / numbers[1].value == value.value and "." not in single


def quantities_agree(expected: Quantity, found: Quantity, algebra: Equality) -> bool:
    """Values with their units: other units are converted, and no unit is any unit."""
    factor = unit_factor(expected, found)
    if factor is None:
        return False
    wanted, given = read_number(expected.body), read_number(found.body)
    if is_radian_pair(expected, found):
        return radians_agree(expected, found, algebra)
    if wanted is not None and given is not None:
        return percents_agree(expected, found, wanted, scale(given, factor))
    if wanted is not None and (match := LETTER_UNIT.fullmatch(found.body)):
        return quantities_agree(expected, Quantity(match[1], NAMES.get(match[2])), algebra)
    if wanted is not None and is_unevaluated(found.body):
        return False
    if not found.body or not expected.body:
        return False
    return algebra.equal(with_percent(expected), scaled_text(with_percent(found), factor))


def unit_factor(expected: Quantity, found: Quantity) -> Fraction | None:
    """How many of the expected unit the found unit is; None where they measure different things."""
    if expected.unit is None or found.unit is None or is_radian_pair(expected, found):
        return Fraction(1)
    if expected.unit.dimension != found.unit.dimension:
        return None
    return found.unit.factor / expected.unit.factor


def is_radian_pair(expected: Quantity, found: Quantity) -> bool:
    """Whether one angle is in degrees and the other in radians."""
    in_degrees = [quantity.unit == DEGREES for quantity in (expected, found)]
    in_radians = [
        quantity.unit == RADIANS or (quantity.unit is None and "\\pi" in quantity.body)
        for quantity in (expected, found)
    ]
    return (in_degrees[0] and in_radians[1]) or (in_radians[0] and in_degrees[1])


def radians_agree(expected: Quantity, found: Quantity, algebra: Equality) -> bool:
    """The same with degrees converted."""
    texts = [
        f"\\frac{{({quantity.body})*\\pi}}{{180}}" if quantity.unit == DEGREES else quantity.body
        for quantity in (expected, found)
    ]
    return algebra.equal(texts[0], texts[1])


def scale(number: Number, factor: Fraction) -> Number:
    """The number in another unit."""
    return number if factor == 1 else Number(number.value * factor)


def scaled_text(text: str, factor: Fraction) -> str:
    """The expression in another unit."""
    return text if factor == 1 else f"\\frac{{{factor.numerator}}}{{{factor.denominator}}}*({text})"


def with_percent(quantity: Quantity) -> str:
    """The expression with its per cent sign worked out."""
    return f"\\frac{{{quantity.body}}}{{100}}" if quantity.is_percent else quantity.body


def percents_agree(expected: Quantity, found: Quantity, wanted: Number, given: Number) -> bool:
    """Numbers of which one, both or none are per cent.

    15 % is 15 per cent, 0.15, and 15 where per cent were asked for; 75 is 75 % but 0.5 is not 0.5 %.
    """
    if expected.is_percent == found.is_percent:
        return numbers_agree(wanted, given)
    if expected.is_percent:
        return numbers_agree(wanted, given) or numbers_agree(shift(wanted), given)
    return numbers_agree(wanted, shift(given)) or (abs(wanted.value) > 1 and numbers_agree(wanted, given))


def shift(number: Number) -> Number:
    """A figure in per cent as a number."""
    places = number.places + 2 if number.is_decimal else 0
    return Number(number.value / HUNDRED, number.is_decimal, number.digits, places)
