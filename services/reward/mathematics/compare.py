"""Whether two mathematical answers agree.

What is said here holds for all forms of an answer; the algebra only compares single expressions.
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
from typing import Protocol

from services.reward.mathematics.assignments import (
    HAS_VARIABLE,
    SET_NAME,
    as_relation,
    by_name,
    expand_items,
    is_derivation,
    names_agree,
    names_set,
    needs_relation,
    read_names,
    right_side,
    with_names,
)
from services.reward.mathematics.basis import read_basis
from services.reward.mathematics.brackets import flatten_vector
from services.reward.mathematics.families import Family, find_families
from services.reward.mathematics.labels import match_labels, read_division, read_labels
from services.reward.mathematics.normalise import normalise, squeeze
from services.reward.mathematics.numbers import read_number
from services.reward.mathematics.quantities import read_clock, read_quantity
from services.reward.mathematics.reading import drop_approximation, read_shape
from services.reward.mathematics.regions import interval_of, may_be_intervals, relation_of
from services.reward.mathematics.scalars import scalars_agree
from services.reward.mathematics.shapes import Assignment, Group, Interval, Matrix, Region, Relation, Scalar, Shape
from services.reward.mathematics.words import is_empty_set, is_wordy, words_agree

OPTION = re.compile(r"^(?:\(\s*[A-H]\s*\)|[A-H]\s*[).:])[\s:,.]*(?![+*/^=])(?=\S)")


class Algebra(Protocol):
    """What compares single expressions."""

    def equal(self, expected: str, found: str) -> bool:
        """Whether two expressions have the same value."""

    def same_relation(self, expected: Relation, found: Relation) -> bool:
        """Whether two equations or inequalities have the same solutions."""

    def same_family(self, expected: Family, found: Family) -> bool:
        """Whether two families have the same members."""


def agree(reference: str, answer: str, algebra: Algebra) -> bool:
    """Whether the answer is the reference in another form.

    Raises what the algebra raises.
    """
    expected, found = normalise(reference), normalise(answer)
    if not found:
        return False
    if is_wordy(expected) or is_empty_set(expected):
        return squeeze(expected) == squeeze(found) or words_agree(expected, drop_option(expected, found))
    families = find_families(reference, answer)
    if families is not None:
        return algebra.same_family(*families)
    expected, found = (", ".join(read_division(text) or (text,)) for text in (expected, drop_option(expected, found)))
    return texts_agree(expected, found, algebra)


def drop_option(expected: str, found: str) -> str:
    """The answer without the letter of an option before it, "(C) 23", unless the reference has letters of its own."""
    return found if re.search(r"[A-H]", expected) else OPTION.sub("", found, count=1)


def texts_agree(expected: str, found: str, algebra: Algebra) -> bool:
    """The same of texts that are normalised."""
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
    """Whether the text is one number with or without a unit, or a time of day, however many words it has."""
    return read_clock(text) is not None or read_number(read_quantity(text).body) is not None


def shapes_agree(wanted: Shape, given: Shape, algebra: Algebra) -> bool:
    """Whether two answers that were taken apart agree."""
    if names_set(given) and not names_set(wanted):
        given = right_side(given)
    if isinstance(wanted, Region) and isinstance(given, Region | Relation) and needs_relation(wanted, given):
        bounds = relation_of(wanted), given if isinstance(given, Relation) else relation_of(given)
        return bounds[0] is not None and bounds[1] is not None and algebra.same_relation(bounds[0], bounds[1])
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
    """A single value against whatever was given: its own value counts, and each of several must be it."""
    match given:
        case Scalar(text):
            return scalars_agree(wanted.text, text, algebra)
        case Assignment(_, value):
            return texts_agree(wanted.text, value, algebra)
        case Relation(_, "=", right):
            return texts_agree(wanted.text, right, algebra)
        case Group("list", items) if len(read_names(items) or ()) > 1 or is_derivation(items):
            # "w = 6, l = 12, A = 72": the last is what the others lead to.
            return scalar_agrees(wanted, read_shape(items[-1]), algebra)
        case Group("tuple", items) if components := read_basis(wanted.text, len(items)):
            return in_order(components, items, algebra)
        case Group(kind, items) if items and kind != "tuple":
            return all(texts_agree(wanted.text, item, algebra) for item in items)
    return False


def assignment_agrees(wanted: Assignment, given: Shape, algebra: Algebra) -> bool:
    """A name with its value: the value alone will do, another name will not, and an equation must be the same one."""
    if isinstance(given, Assignment):
        if names_agree(wanted, given):
            return texts_agree(wanted.value, given.value, algebra)
        given = as_relation(given)
    if isinstance(given, Relation):
        is_function = bool(HAS_VARIABLE.search(wanted.value))
        return is_function and given.sign == "=" and algebra.same_relation(as_relation(wanted), given)
    if isinstance(given, Group) and given.kind == "list":
        if is_derivation(given.items):
            return assignment_agrees(wanted, read_shape(given.items[-1]), algebra)
        return bool(given.items) and all(
            assignment_agrees(wanted, read_shape(item), algebra) for item in with_names(given.items)
        )
    value = read_shape(wanted.value)
    return shapes_agree(value, given, algebra)


def relation_agrees(wanted: Relation, given: Shape, algebra: Algebra) -> bool:
    """An equation or inequality against another one; nothing else is one."""
    if isinstance(given, Assignment):
        given = as_relation(given)
    return isinstance(given, Relation) and algebra.same_relation(wanted, given)


def group_agrees(wanted: Group, given: Shape, algebra: Algebra) -> bool:
    """Several values."""
    given = right_side(given)
    if isinstance(given, Matrix):
        cells = flatten_vector(given)
        return wanted.kind == "tuple" and cells is not None and in_order(wanted.items, cells, algebra)
    if isinstance(given, Scalar):
        components = read_basis(given.text, len(wanted.items)) if wanted.kind == "tuple" else None
        given = Group("tuple", components) if components else Group("list", (given.text,))
    if not isinstance(given, Group):
        return False
    if wanted.kind == "tuple":
        if given.kind == "set" or (wanted.brackets != given.brackets and may_be_intervals(wanted, given)):
            return False
        return in_order(wanted.items, by_name(given.items), algebra)
    if wanted.kind == "set" and given.kind == "tuple":
        return False
    labels = read_labels(wanted.items)
    if labels is not None:
        return labelled_agree(labels, given, algebra)
    names = read_names(wanted.items)
    if names is not None:
        return named_agree(names, given, algebra)
    expected = expand_items(with_names(wanted.items))
    found = expand_items(with_names(given.items))
    return in_any_order(expected, found, algebra)


def labelled_agree(labels: dict[str, str], given: Group, algebra: Algebra) -> bool:
    """Values under words: each under its own where both have the same words, else all of them in their order."""
    others = read_labels(given.items)
    named = match_labels(labels, others) if others is not None else None
    if named is not None:
        return in_order(tuple(labels.values()), named, algebra)
    return given.kind != "set" and in_order(
        tuple(labels.values()), tuple(others.values()) if others else given.items, algebra
    )


def named_agree(names: dict[str, str], given: Group, algebra: Algebra) -> bool:
    """Values under different names: each under its own, or all of them in the order of the names."""
    others = read_names(given.items)
    if given.kind == "set" or (others is not None and others.keys() != names.keys()):
        return False
    return in_order(tuple(names.values()), by_name(given.items), algebra)


def in_order(expected: Sequence[str], found: Sequence[str], algebra: Algebra) -> bool:
    """Whether values agree one by one."""
    return len(expected) == len(found) and all(
        texts_agree(left, right, algebra) for left, right in zip(expected, found, strict=True)
    )


def in_any_order(expected: Sequence[str], found: Sequence[str], algebra: Algebra) -> bool:
    """Whether every value has a partner; values that are given twice count once."""
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
    """Two items of lists: numbered names, x_1 and x_2, do not count."""
    unnumbered = [re.sub(r"^([A-Za-z])_\{?[0-9]\}?\s*=", r"\1 =", item) for item in (value, other)]
    return texts_agree(unnumbered[0], unnumbered[1], algebra)


def regions_agree(wanted: Shape, given: Shape, algebra: Algebra) -> bool:
    """Unions of intervals; "(1, 2)" is one when it is compared with one."""
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
    """The region that a shape is or may be."""
    if isinstance(shape, Region):
        return shape
    if isinstance(shape, Assignment):
        inner = as_region(read_shape(shape.value))
        return None if inner is None else Region("" if SET_NAME.fullmatch(shape.name) else shape.name, inner.parts)
    return interval_of(shape) if isinstance(shape, Group) else None


def intervals_agree(left: Interval, right: Interval, algebra: Algebra) -> bool:
    """The same ends, and the same ends belong to them."""
    if (left.low_open, left.high_open) != (right.low_open, right.high_open):
        return False
    return texts_agree(left.low, right.low, algebra) and texts_agree(left.high, right.high, algebra)


def matrix_agrees(wanted: Matrix, given: Shape, algebra: Algebra) -> bool:
    """Cell by cell; a vector may be written as a tuple."""
    given = right_side(given)
    if isinstance(given, Matrix):
        shape = [len(row) for row in wanted.rows]
        if shape != [len(row) for row in given.rows]:
            return False
        return all(in_order(left, right, algebra) for left, right in zip(wanted.rows, given.rows, strict=True))
    cells = flatten_vector(wanted)
    if isinstance(given, Scalar) and "\\begin{" in given.text:
        rows = " \\\\ ".join(" & ".join(row) for row in wanted.rows)
        return algebra.equal(f"\\begin{{pmatrix}}{rows}\\end{{pmatrix}}", given.text)
    if isinstance(given, Scalar) and cells and (components := read_basis(given.text, len(cells))):
        return in_order(cells, components, algebra)
    is_tuple = isinstance(given, Group) and given.kind in ("tuple", "list")
    return is_tuple and isinstance(given, Group) and cells is not None and in_order(cells, given.items, algebra)
