"""Compares two mathematical answers.

These rules hold for all forms of an answer; the algebra only compares single expressions.
- The order of tuples and vectors counts, that of lists and sets does not; a list is no tuple only when it is in braces.
- A name before a value may be missing, but not be another one; the same holds for units, which are converted.
- A per cent sign may be missing where the figure is the same, and 50 % is 0.5.
- Round and square brackets of an interval differ; an inequality of one variable is its interval.
- A sum or product of plain numbers is not a number: it is the question and not its answer.
- Several different answers to a question that has one are no answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

from services.reward.math.notation import normalise, squeeze
from services.reward.math.numbers import Number, is_unevaluated, numbers_agree, read_number
from services.reward.math.parse import (
    VARIABLE,
    Assignment,
    Group,
    Interval,
    Matrix,
    Region,
    Relation,
    Scalar,
    Shape,
    drop_approximation,
    flatten_vector,
    interval_of,
    may_be_intervals,
    read_shape,
)
from services.reward.math.units import (
    DEGREES,
    RADIANS,
    Quantity,
    is_unit_phrase,
    read_quantity,
)
from services.reward.math.words import is_empty_set, is_wordy, words_agree

MODULUS = re.compile(r"(?:\\pmod|\\bmod|\bmod)\s*\{?\s*([0-9]+)")
COUNTED = re.compile(r"[0-9]\s+([A-Za-z]{3,})$")
CONSTANT = re.compile(r"\+\s*[CcKk]$")
OPTION = re.compile(r"^(?:\(\s*[A-H]\s*\)|[A-H]\s*[).:])[\s:,.]*(?![+*/^=])(?=\S)")
FUNCTION_OF = re.compile(r"([A-Za-z]+'*(?:\^\{-1\})?)\s*\(([^=]*)\)")
LETTER = re.compile(r"[A-Za-z]")
SET_NAME = re.compile(r"(?:\\mathbb)?\{?[A-Z]\}?(?:_\{?[A-Za-z0-9]\}?)?|[A-Za-z]{3,}")
HAS_VARIABLE = re.compile(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])")
HUNDRED = Fraction(100)
HALF_OF_DAY = re.compile(r" [ap]m$")
RATIO = re.compile(r"[^:]+(?::[^:]+)+")
DIGITS = re.compile(r"[0-9A-Z]+")
BASED = re.compile(r"([0-9A-Z]+)_\{?([0-9]+)\}?")


class Algebra(Protocol):
    """Comparison of single expressions."""

    def equal(self, expected: str, found: str) -> bool:
        """Returns whether two expressions have the same value."""

    def same_relation(self, expected: Relation, found: Relation) -> bool:
        """Returns whether two equations or inequalities have the same solutions."""


def agree(reference: str, answer: str, algebra: Algebra) -> bool:
    """Returns whether the answer is the reference in another form.

    Raises what the algebra raises.
    """
    if squeeze(reference) == squeeze(answer):
        return True
    moduli = [set(MODULUS.findall(text)) for text in (reference, answer)]
    if all(moduli) and moduli[0] != moduli[1]:
        return False
    expected, found = name_constant(normalise(reference), normalise(answer))
    if not found:
        return False
    if is_wordy(expected) or is_empty_set(expected):
        return squeeze(expected) == squeeze(found) or words_agree(expected, drop_option(expected, found))
    return texts_agree(expected, drop_option(expected, found), algebra)


def name_constant(expected: str, found: str) -> tuple[str, str]:
    """Gives the constant of integration the same name in both texts, where the reference ends with one."""
    ends = CONSTANT.search(expected), CONSTANT.search(found)
    return (expected, found[: ends[1].start()] + ends[0][0]) if ends[0] and ends[1] else (expected, found)


def drop_option(expected: str, found: str) -> str:
    """Removes the letter of an option before an answer, "(C) 23", unless the reference has letters of its own."""
    return found if re.search(r"[A-H]", expected) else OPTION.sub("", found, count=1)


def texts_agree(expected: str, found: str, algebra: Algebra) -> bool:
    """Returns whether two normalised texts agree."""
    if squeeze(expected) == squeeze(found):
        return True
    if "≈" in expected or "≈" in found:
        number = read_number(expected)
        rounded = found.rpartition("≈")[2].strip()
        if number is not None and number.is_decimal and read_number(read_quantity(rounded).body) is not None:
            return scalars_agree(expected, rounded, algebra)
        expected, found = drop_approximation(expected), drop_approximation(found)
    if is_single(expected) and is_single(found):
        return scalars_agree(expected, found, algebra)
    wanted = Scalar(expected) if is_single(expected) else read_shape(expected)
    given = Scalar(found) if is_single(found) and not isinstance(wanted, Group) else read_shape(found)
    return shapes_agree(wanted, given, algebra)


def is_single(text: str) -> bool:
    """Returns whether the text is one number with or without a unit, however many words it has."""
    return read_number(read_quantity(text).body) is not None


def shapes_agree(wanted: Shape, given: Shape, algebra: Algebra) -> bool:
    """Returns whether two answers that were taken apart agree."""
    if isinstance(wanted, Region) or isinstance(given, Region):
        return regions_agree(wanted, given, algebra)
    if isinstance(wanted, Group):
        return group_agrees(wanted, given, algebra)
    if isinstance(wanted, Matrix):
        return matrix_agrees(wanted, given, algebra)
    if isinstance(wanted, Relation):
        return relation_agrees(wanted, given, algebra)
    if isinstance(wanted, Assignment):
        return assignment_agrees(wanted, given, algebra)
    return scalar_agrees(wanted, given, algebra)


def scalar_agrees(wanted: Scalar, given: Shape, algebra: Algebra) -> bool:
    """Compares a single value with whatever was given: its own value counts, and each of several must be it."""
    match given:
        case Scalar(text):
            return scalars_agree(wanted.text, text, algebra)
        case Assignment(_, value):
            return texts_agree(wanted.text, value, algebra)
        case Relation(_, "=", right):
            return texts_agree(wanted.text, right, algebra)
        case Group(kind, items) if items and kind != "tuple":
            return all(texts_agree(wanted.text, item, algebra) for item in items)
    return False


def assignment_agrees(wanted: Assignment, given: Shape, algebra: Algebra) -> bool:
    """Compares a name and its value: the value alone will do, another name will not, an equation must be the same."""
    if isinstance(given, Assignment):
        if names_agree(wanted, given):
            return texts_agree(wanted.value, given.value, algebra)
        given = Relation(given.name, "=", given.value)
    value = read_shape(wanted.value)
    if isinstance(given, Relation):
        is_function = bool(HAS_VARIABLE.search(wanted.value))
        return (
            is_function and given.sign == "=" and algebra.same_relation(Relation(wanted.name, "=", wanted.value), given)
        )
    if isinstance(given, Group) and given.kind == "list":
        if isinstance(value, Group) and value.kind == "list":
            named = tuple(f"{wanted.name} = {item}" for item in value.items)
            return group_agrees(Group("list", named), given, algebra)
        return bool(given.items) and all(
            assignment_agrees(wanted, read_shape(item), algebra) for item in with_names(given.items)
        )
    return shapes_agree(value, given, algebra)


def relation_agrees(wanted: Relation, given: Shape, algebra: Algebra) -> bool:
    """Compares an equation or inequality with another one; nothing else is one."""
    if isinstance(given, Assignment):
        given = Relation(given.name, "=", given.value)
    return isinstance(given, Relation) and algebra.same_relation(wanted, given)


def group_agrees(wanted: Group, given: Shape, algebra: Algebra) -> bool:
    """Compares several values."""
    given = right_side(given)
    if isinstance(given, Matrix):
        cells = flatten_vector(given)
        return wanted.kind == "tuple" and cells is not None and in_order(wanted.items, cells, algebra)
    if isinstance(given, Scalar):
        given = Group("list", (given.text,))
    if not isinstance(given, Group):
        return False
    if wanted.kind == "tuple":
        if given.kind == "set" or (wanted.brackets != given.brackets and may_be_intervals(wanted, given)):
            return False
        return in_order(wanted.items, by_name(given.items), algebra)
    if wanted.kind == "set" and given.kind == "tuple":
        return False
    names = read_names(wanted.items)
    if names is not None:
        others = read_names(given.items)
        is_other = others is not None and others.keys() != names.keys()
        return not is_other and given.kind != "set" and in_order(by_name(wanted.items), by_name(given.items), algebra)
    nouns = [match[1] for item in wanted.items if (match := COUNTED.search(item)) and not is_unit_phrase(match[1])]
    if len(set(nouns)) == len(wanted.items):
        return given.kind == "list" and in_order(wanted.items, given.items, algebra)
    expected = expand_items(with_names(wanted.items))
    found = expand_items(with_names(given.items))
    return in_any_order(expected, found, algebra)


def in_order(expected: Sequence[str], found: Sequence[str], algebra: Algebra) -> bool:
    """Returns whether values agree one by one."""
    return len(expected) == len(found) and all(
        texts_agree(left, right, algebra) for left, right in zip(expected, found, strict=True)
    )


def in_any_order(expected: Sequence[str], found: Sequence[str], algebra: Algebra) -> bool:
    """Returns whether every value has a partner; values that are given twice count once."""
    found = list(dict.fromkeys(found))
    expected = list(dict.fromkeys(expected))
    if len(expected) != len(found):
        return False
    left = list(found)
    for value in expected:
        partner = next((other for other in left if items_agree(value, other, algebra)), None)
        if partner is None:
            return False
        left.remove(partner)
    return True


def items_agree(value: str, other: str, algebra: Algebra) -> bool:
    """Compares two items of lists: numbered names, x_1 and x_2, do not count."""
    unnumbered = [re.sub(r"^([A-Za-z])_\{?[0-9]\}?\s*=", r"\1 =", item) for item in (value, other)]
    return texts_agree(unnumbered[0], unnumbered[1], algebra)


def regions_agree(wanted: Shape, given: Shape, algebra: Algebra) -> bool:
    """Compares unions of intervals; "(1, 2)" is one when it is compared with one."""
    left, right = as_region(wanted), as_region(given)
    if left is None or right is None or (left.variable and right.variable and left.variable != right.variable):
        return False
    if len(left.parts) != len(right.parts):
        return False
    others = list(right.parts)
    for part in left.parts:
        partner = next((other for other in others if intervals_agree(part, other, algebra)), None)
        if partner is None:
            return False
        others.remove(partner)
    return True


def as_region(shape: Shape) -> Region | None:
    """Returns the region that a shape is or may be."""
    if isinstance(shape, Region):
        return shape
    if isinstance(shape, Assignment):
        inner = as_region(read_shape(shape.value))
        return None if inner is None else Region("" if SET_NAME.fullmatch(shape.name) else shape.name, inner.parts)
    return interval_of(shape) if isinstance(shape, Group) else None


def intervals_agree(left: Interval, right: Interval, algebra: Algebra) -> bool:
    """Returns whether two intervals have the same ends, and the same ends belong to them."""
    if (left.low_open, left.high_open) != (right.low_open, right.high_open):
        return False
    return texts_agree(left.low, right.low, algebra) and texts_agree(left.high, right.high, algebra)


def matrix_agrees(wanted: Matrix, given: Shape, algebra: Algebra) -> bool:
    """Compares a matrix cell by cell; a vector may be written as a tuple."""
    given = right_side(given)
    if isinstance(given, Matrix):
        shape = [len(row) for row in wanted.rows]
        if shape != [len(row) for row in given.rows]:
            return False
        return all(in_order(left, right, algebra) for left, right in zip(wanted.rows, given.rows, strict=True))
    cells = flatten_vector(wanted)
    is_tuple = isinstance(given, Group) and given.kind in ("tuple", "list")
    return is_tuple and isinstance(given, Group) and cells is not None and in_order(cells, given.items, algebra)


def names_agree(wanted: Assignment, given: Assignment) -> bool:
    """Returns whether two values bear the same name; those of a function are f(x), y and the like."""
    left, right = squeeze(wanted.name), squeeze(given.name)
    if left == right or not left or not right:
        return True
    if not VARIABLE.fullmatch(left) and not VARIABLE.fullmatch(right):
        return True
    functions = [FUNCTION_OF.fullmatch(name) for name in (left, right)]
    if any(functions) and HAS_VARIABLE.search(wanted.value):
        arguments = {function[2] for function in functions if function}
        others = [name for function, name in zip(functions, (left, right), strict=True) if not function]
        return len(arguments) == 1 and all(name == "y" for name in others)
    return not VARIABLE.fullmatch(left) or not VARIABLE.fullmatch(right)


def right_side(shape: Shape) -> Shape:
    """Returns the right side of an equation; any other shape as it is."""
    if isinstance(shape, Assignment):
        return read_shape(shape.value)
    return read_shape(shape.right) if isinstance(shape, Relation) and shape.sign == "=" else shape


def with_names(items: Sequence[str]) -> tuple[str, ...]:
    """Returns the items of "x = -1, 3" with the first one's name before those that have none."""
    first = read_shape(items[0]) if items else None
    if not isinstance(first, Assignment) or not VARIABLE.fullmatch(first.name):
        return tuple(items)
    return tuple(item if "=" in item else f"{first.name} = {item}" for item in items)


def read_names(items: Sequence[str]) -> dict[str, str] | None:
    """Returns the values of "y = 2, x = 1" by name, in the order of the names; None of items without names.

    Numbered names, x_1 and x_2, are those of a list.
    """
    shapes = [read_shape(item) for item in items]
    found = {shape.name: shape.value for shape in shapes if isinstance(shape, Assignment)}
    if len(found) != len(items) or len({name.partition("_")[0] for name in found}) < len(items):
        return None
    return dict(sorted(found.items()))


def by_name(items: Sequence[str]) -> tuple[str, ...]:
    """Returns the values in the order of their names; items without names in their own."""
    names = read_names(items)
    return tuple(items if names is None else names.values())


def expand_items(items: Sequence[str]) -> list[str]:
    """Returns items with ± as two, and an item that is a list or set as its items."""
    expanded: list[str] = []
    for item in items:
        shape = read_shape(item)
        name = f"{shape.name} = " if isinstance(shape, Assignment) else ""
        inner = read_shape(shape.value) if isinstance(shape, Assignment) else shape
        if isinstance(inner, Group) and (inner.kind == "set" or "±" in item or "∓" in item):
            expanded += inner.items if inner.kind == "set" else [name + value for value in inner.items]
        else:
            expanded.append(item)
    return expanded


def scalars_agree(expected: str, found: str, algebra: Algebra) -> bool:
    """Returns whether two normalised texts are the same value."""
    halves = HALF_OF_DAY.search(expected), HALF_OF_DAY.search(found)
    if halves[0] or halves[1]:
        if halves[0] and halves[1] and halves[0][0] != halves[1][0]:
            return False
        expected, found = HALF_OF_DAY.sub("", expected), HALF_OF_DAY.sub("", found)
    if RATIO.fullmatch(expected) or RATIO.fullmatch(found):
        return ratios_agree(expected, found, algebra)
    based = BASED.fullmatch(expected), BASED.fullmatch(found)
    if based[0] and (based[1] or DIGITS.fullmatch(found) or read_number(found)):
        return (based[0][1], based[0][2]) == (based[1][1], based[1][2]) if based[1] else based[0][1] == found
    if based[0] and re.search(r"[0-9]", based[0][1]):
        return False
    return quantities_agree(read_quantity(expected), read_quantity(found), algebra)


def ratios_agree(expected: str, found: str, algebra: Algebra) -> bool:
    """Compares ratios: the same numbers in the same order."""
    left, right = expected.split(":"), found.split(":")
    if len(left) == len(right):
        return all(scalars_agree(a.strip(), b.strip(), algebra) for a, b in zip(left, right, strict=True))
    return False


def quantities_agree(expected: Quantity, found: Quantity, algebra: Algebra) -> bool:
    """Compares values with their units: other units are converted, and no unit is any unit."""
    factor = unit_factor(expected, found)
    if factor is None:
        return False
    wanted, given = read_number(expected.body), read_number(found.body)
    if is_radian_pair(expected, found):
        return radians_agree(expected, found, algebra)
    if wanted is not None and given is not None:
        return percents_agree(expected, found, wanted, scale(given, factor))
    if wanted is not None and is_unevaluated(found.body):
        return False
    if not found.body or not expected.body:
        return False
    return algebra.equal(with_percent(expected), scaled_text(with_percent(found), factor))


def unit_factor(expected: Quantity, found: Quantity) -> Fraction | None:
    """Returns how many of the expected unit the found unit is; None where they measure different things."""
    if expected.unit is None or found.unit is None or is_radian_pair(expected, found):
        return Fraction(1)
    if expected.unit.dimension != found.unit.dimension:
        return None
    return found.unit.factor / expected.unit.factor


def is_radian_pair(expected: Quantity, found: Quantity) -> bool:
    """Returns whether one angle is in degrees and the other in radians."""
    in_degrees = [quantity.unit == DEGREES for quantity in (expected, found)]
    in_radians = [
        quantity.unit == RADIANS or (quantity.unit is None and "\\pi" in quantity.body)
        for quantity in (expected, found)
    ]
    return (in_degrees[0] and in_radians[1]) or (in_radians[0] and in_degrees[1])


def radians_agree(expected: Quantity, found: Quantity, algebra: Algebra) -> bool:
    """Compares an angle in degrees with one in radians."""
    texts = [
        f"\\frac{{({quantity.body})*\\pi}}{{180}}" if quantity.unit == DEGREES else quantity.body
        for quantity in (expected, found)
    ]
    return algebra.equal(texts[0], texts[1])


def scale(number: Number, factor: Fraction) -> Number:
    """Returns the number in another unit."""
    return number if factor == 1 else Number(number.value * factor)


def scaled_text(text: str, factor: Fraction) -> str:
    """Returns the expression in another unit."""
    return text if factor == 1 else f"\\frac{{{factor.numerator}}}{{{factor.denominator}}}*({text})"


def with_percent(quantity: Quantity) -> str:
    """Returns the expression with its per cent sign worked out."""
    return f"\\frac{{{quantity.body}}}{{100}}" if quantity.is_percent else quantity.body


def percents_agree(expected: Quantity, found: Quantity, wanted: Number, given: Number) -> bool:
    """Compares numbers of which one, both or none are per cent.

    15 % is 15 per cent, 0.15, and 15 where per cent were asked for; 75 is 75 % but 0.5 is not 0.5 %.
    """
    if expected.is_percent == found.is_percent:
        return numbers_agree(wanted, given)
    if expected.is_percent:
        return numbers_agree(wanted, given) or numbers_agree(shift(wanted), given)
    return numbers_agree(wanted, shift(given)) or (abs(wanted.value) > 1 and numbers_agree(wanted, given))


def shift(number: Number) -> Number:
    """Returns a figure in per cent as a number."""
    places = number.places + 2 if number.is_decimal else 0
    return Number(number.value / HUNDRED, number.is_decimal, number.digits, places)
