"""Answers with names: which names are the same, and what values stand under them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from services.reward.mathematics.names import VARIABLE
from services.reward.mathematics.normalise import squeeze
from services.reward.mathematics.reading import read_shape
from services.reward.mathematics.regions import relation_of
from services.reward.mathematics.shapes import Assignment, Group, Region, Relation, Shape

FUNCTION_OF = re.compile(r"([A-Za-z]+'*(?:\^\{-1\})?)\s*\(([^=]*)\)")
LETTER = re.compile(r"[A-Za-z]")
SET_NAME = re.compile(r"(?:\\mathbb)?\{?[A-Z]\}?(?:_\{?[A-Za-z0-9]\}?)?|[A-Za-z]{3,}")
HAS_VARIABLE = re.compile(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])")


def names_agree(wanted: Assignment, given: Assignment) -> bool:
    """Whether two values bear the same name; those of a function are f(x), y and the like."""
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


def names_set(shape: Shape) -> bool:
    """Whether a name is that of a set, "S = \\{4\\}", and not of what is in it."""
    if not isinstance(shape, Assignment) or not SET_NAME.fullmatch(squeeze(shape.name)):
        return False
    value = read_shape(shape.value)
    return isinstance(value, Region) or (isinstance(value, Group) and value.kind == "set")


def is_derivation(items: Sequence[str]) -> bool:
    """Whether unsolved equations lead to a solved one, "x + 3 = 25, x = 22", or one computation to the next."""
    *before, last = map(read_shape, items)
    if not before or not all(isinstance(shape, Relation) for shape in before):
        return False
    return isinstance(last, Assignment) or is_computation([*before, last])


def is_computation(shapes: Sequence[Shape]) -> bool:
    """Whether all are results of computations with numbers, "42 / 6 = 7 and 7 · 5 = 35"."""
    return all(isinstance(each, Relation) and each.sign == "=" and not LETTER.search(each.left) for each in shapes)


def as_relation(assignment: Assignment) -> Relation:
    """The equation that an assignment is."""
    return Relation(assignment.name, "=", assignment.value)


def right_side(shape: Shape) -> Shape:
    """What an equation says that its left side is."""
    if isinstance(shape, Assignment):
        return read_shape(shape.value)
    return read_shape(shape.right) if isinstance(shape, Relation) and shape.sign == "=" else shape


def with_names(items: Sequence[str]) -> tuple[str, ...]:
    """The items of "x = -1, 3" with the first one's name before those that have none."""
    first = read_shape(items[0]) if items else None
    if not isinstance(first, Assignment) or not VARIABLE.fullmatch(first.name):
        return tuple(items)
    return tuple(item if "=" in item else f"{first.name} = {item}" for item in items)


def read_names(items: Sequence[str]) -> dict[str, str] | None:
    """The values of "y = 2, x = 1" by their names, in the order of the names; None of items that have no names.

    Numbered names, x_1 and x_2, are those of a list.
    """
    shapes = [read_shape(item) for item in items]
    found = {shape.name: shape.value for shape in shapes if isinstance(shape, Assignment)}
    if len(found) != len(items) or len({name.partition("_")[0] for name in found}) < len(items):
        return None
    return dict(sorted(found.items()))


def by_name(items: Sequence[str]) -> tuple[str, ...]:
    """The values in the order of their names; items without names in their own."""
    names = read_names(items)
    return tuple(items if names is None else names.values())


def expand_items(items: Sequence[str]) -> list[str]:
    """The items with ± as two, and an item that is a list or set as its items."""
    expanded = []
    for item in items:
        if "±" in item or "∓" in item:
            expanded += expand_plus_minus(item)
            continue
        shape = read_shape(item)
        inner = read_shape(shape.value) if isinstance(shape, Assignment) else shape
        expanded += inner.items if isinstance(inner, Group) and inner.kind == "set" else [item]
    return expanded


def expand_plus_minus(item: str) -> list[str]:
    """Both values, each with the name that the item has."""
    shape = read_shape(item)
    name = f"{shape.name} = " if isinstance(shape, Assignment) else ""
    values = read_shape(shape.value) if isinstance(shape, Assignment) else shape
    return [name + value for value in values.items] if isinstance(values, Group) else [item]


def needs_relation(wanted: Region, given: Region | Relation) -> bool:
    """Whether two inequalities are of several variables, or one is solved for another variable than the other."""
    if isinstance(given, Relation):
        return given.sign != "="
    bounds = relation_of(wanted), relation_of(given)
    has_variables = all(bound is not None and HAS_VARIABLE.search(bound.right) for bound in bounds)
    return wanted.variable != given.variable and has_variables
