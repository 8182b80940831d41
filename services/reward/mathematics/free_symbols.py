"""Expressions that are the same up to the names of their constants or parameters.

Parameters that range over the integers may be shifted as well: 5k + 2 and 5k - 3 are the same numbers. Sets of such
numbers are compared at small parameters, where every member of one has to be a member of the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from typing import Any

import sympy

from services.reward.mathematics.families import Family

ANY_CONSTANT = re.compile(r"(?:[A-DKa-dk])(?:_\{?[0-9a-z]\}?)?")
INTEGRATION = re.compile(r"(?:[CcKk])(?:_\{?[0-9]\}?)?")
# How references write constants of integration; a lower-case c is one only as the last term and beside no a or b.
WRITTEN = re.compile(r"(?<![A-Za-z\\])[CK](?![A-Z])|^[^abd]*\+\s*c\s*$")
INNER, OUTER = range(-3, 4), range(-16, 17)
PLACES = 7
MAX_MEMBERS = 12
Equal = Callable[[Any, Any], bool | None]


def has_constant(reference: str) -> bool:
    """Whether a reference has a constant that may bear another name."""
    return WRITTEN.search(reference) is not None


def find_constant(expression: Any) -> Any:
    """The constant of integration that is added to an expression; None where it has none."""
    for symbol in sorted(expression.free_symbols, key=str):
        if INTEGRATION.fullmatch(str(symbol)) and sympy.diff(expression, symbol) == 1:
            return symbol
    return None


def equal_up_to_constants(wanted: Any, given: Any, equal: Equal) -> bool:
    """Whether two expressions differ only by the name or the value of their constants.

    One that is added may be any number, so that sin²/2 + C is -cos²/2 + K; others are renamed.
    """
    others = given.free_symbols - wanted.free_symbols
    constant = find_constant(wanted)
    if constant is not None and wanted.free_symbols - {constant}:
        names = [constant] if constant in given.free_symbols else [each for each in others if is_constant(each)]
        if len(names) != 1 or (others - set(names)):
            return False
        [name] = names
        slope = sympy.diff(given, name)
        if slope.free_symbols or slope == 0:
            return False
        return is_number(wanted.subs(constant, 0) - given.subs(name, 0), equal)
    missing = [each for each in wanted.free_symbols - given.free_symbols if INTEGRATION.fullmatch(str(each))]
    if not 1 <= len(missing) == len(others) <= 3 or not all(is_constant(each) for each in others):
        return False
    return any(
        equal(wanted, given.subs(dict(zip(order, missing, strict=True)), simultaneous=True))
        for order in permutations(sorted(others, key=str))
    )


def is_constant(symbol: Any) -> bool:
    """Whether a symbol bears one of the names of constants."""
    return ANY_CONSTANT.fullmatch(str(symbol)) is not None


def is_number(difference: Any, equal: Equal) -> bool:
    """Whether an expression has the same value wherever it is evaluated."""
    symbols = sorted(difference.free_symbols, key=str)
    return all(equal(sympy.diff(difference, symbol), sympy.Integer(0)) for symbol in symbols)


def families_agree(wanted: Family, given: Family, parse: Callable[[str, bool], Any], equal: Equal) -> bool:
    """Whether two families have the same members.

    Raises what `parse` raises.
    """
    if max(len(wanted.members), len(given.members)) > MAX_MEMBERS:
        return False
    left = [[parse(part, True) for part in member] for member in wanted.members]
    right = [[parse(part, False) for part in member] for member in given.members]
    parts = [part for member in [*left, *right] for part in member]
    if not all(isinstance(part, sympy.Expr) for part in parts):
        return False
    symbols = find_parameters(left, wanted.parameters), find_parameters(right, given.parameters)
    fixed = symbols_of(left) - set(symbols[0])
    if not given.parameters:
        symbols = symbols[0], sorted(symbols_of(right) - fixed, key=str)
    elif not wanted.parameters:
        symbols, fixed = (sorted(symbols_of(left), key=str), symbols[1]), set()
    if len(symbols[0]) != len(symbols[1]) or symbols_of(right) - set(symbols[1]) - fixed:
        return False
    if len(symbols[0]) == 1 and not wanted.is_real and not fixed:
        return same_members(left, symbols[0][0], right, symbols[1][0])
    return any(same_expressions(left, right, symbols[0], order, equal) for order in permutations(symbols[1]))


def symbols_of(members: Sequence[Sequence[Any]]) -> set[Any]:
    """All symbols of a family."""
    return {symbol for member in members for part in member for symbol in part.free_symbols}


def find_parameters(members: Sequence[Sequence[Any]], names: Sequence[str]) -> list[Any]:
    """The symbols that bear the parameters' names."""
    return sorted((symbol for symbol in symbols_of(members) if str(symbol) in names), key=str)


def same_expressions(
    left: Sequence[Sequence[Any]],
    right: Sequence[Sequence[Any]],
    names: Sequence[Any],
    order: Sequence[Any],
    equal: Equal,
) -> bool:
    """Whether the members are equal one by one when the parameters of the second take the names of the first."""
    renamed = dict(zip(order, names, strict=True))
    return len(left) == len(right) and all(
        len(one) == len(other)
        and all(equal(a, b.subs(renamed, simultaneous=True)) for a, b in zip(one, other, strict=True))
        for one, other in zip(left, right, strict=True)
    )


def same_members(left: Sequence[Sequence[Any]], name: Any, right: Sequence[Sequence[Any]], other: Any) -> bool:
    """Whether the members of each at small integers are members of the other."""
    some, others = set(values_of(left, name, INNER)), set(values_of(right, other, INNER))
    if not some or not others:
        return False
    return some <= set(values_of(right, other, OUTER)) and others <= set(values_of(left, name, OUTER))


def values_of(members: Sequence[Sequence[Any]], name: Any, numbers: range) -> Iterator[tuple[Any, ...]]:
    """The members' values, rounded, for these values of the parameter."""
    for member in members:
        for number in numbers:
            values = [part.subs(name, number).evalf(20) for part in member]
            if all(value.is_number and value.is_finite for value in values):
                pairs = [complex(value) for value in values]
                yield tuple((round(pair.real, PLACES) + 0.0, round(pair.imag, PLACES) + 0.0) for pair in pairs)
