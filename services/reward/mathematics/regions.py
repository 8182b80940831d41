"""Reads intervals and inequalities of one variable as sets of numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence

from services.reward.mathematics.absolute import read_absolute
from services.reward.mathematics.brackets import read_brackets
from services.reward.mathematics.names import FUNCTION_NAME, VARIABLE
from services.reward.mathematics.numbers import read_number
from services.reward.mathematics.shapes import REVERSED, Group, Interval, Region, Relation
from services.reward.mathematics.splitting import split_relations, split_sign, split_top

SET_BUILDER = re.compile(r"[⦃{]\s*[A-Za-z]\s*(?:∈\s*ℝ\s*)?[:|]\s*(.+?)\s*[⦄}]")
REAL_VARIABLE = re.compile(r"[A-Za-z]\s*∈\s*ℝ")
ALL_BUT = re.compile(
    r"ℝ\s*(?:\\setminus|\\backslash|\\|-)\s*⦃\s*(.+?)\s*⦄"
    r"|(?:all|any) real (?:numbers?|values?)(?: of [a-z]|,? [a-z])? (?:except|but|other than)(?: for)?\s+"
    r"(?:[a-z]\s*=\s*)?(.+)"
)
REALS = re.compile(
    r"ℝ|(?:the )?(?:set of )?(?:all|any|every) (?:the )?(?:real(?: numbers?| values?)?|reals|numbers"
    r"|values|[xyt](?![a-z]))"
    r"(?:(?: of|,)? [a-z])?",
    re.IGNORECASE,
)


def read_region(text: str) -> Region | None:
    """A union of intervals, an inequality solved for a variable, several of them, or all real numbers.

    "(1, 2)" alone may be a point: it is no region.
    """
    if REALS.fullmatch(text):
        return Region("", (Interval("-∞", "∞", True, True),))
    hole = ALL_BUT.fullmatch(text)
    if hole and len(split_top(value := hole[1] or hole[2])) == 1:
        return Region("", all_but(value))
    builder = SET_BUILDER.fullmatch(text)
    if builder:
        inner = read_region(builder[1])
        return None if inner is None else Region("", inner.parts)  # the variable of a set is bound in it
    member = re.fullmatch(r"([A-Za-z]|\\[A-Za-z]+)\s*∈\s*(.+)", text)
    if member and (inner := read_region(member[2]) or interval_of(read_brackets(member[2]))):
        return Region(member[1], inner.parts)
    pieces = split_sign(text, "∪")
    if len(pieces) > 1:
        regions = [read_region(piece) or interval_of(read_brackets(piece)) for piece in pieces]
        return join_regions([region for region in regions if region]) if all(regions) else None
    items = [item for item in split_top(text) if not REAL_VARIABLE.fullmatch(item)]
    if len(items) > 1:
        return read_inequalities(text, items)
    text = items[0] if items else text
    group = read_brackets(text)
    if group is not None:
        is_certain = group.brackets in ("(]", "[)") or any("∞" in item for item in group.items)
        return interval_of(group) if is_certain else None
    return read_inequality(text)


def interval_of(group: Group | None) -> Region | None:
    """What "(1, 2)" or "[1, 2]" is when it is an interval."""
    if group is None or len(group.items) != 2 or group.brackets not in ("()", "[]", "(]", "[)"):
        return None
    low, high = group.items
    return Region("", (Interval(low, high, group.brackets[0] == "(", group.brackets[1] == ")"),))


def may_be_intervals(*groups: Group) -> bool:
    """Whether all of them can be intervals: two ends in brackets, the second one not below the first."""
    return all(interval_of(group) and not is_empty(*group.items) for group in groups)


def read_inequalities(text: str, items: Sequence[str]) -> Region | None:
    """Inequalities of one variable: joined by "and" when one gives the low end and the other the high, else a union."""
    regions = [read_inequality(item) for item in items]
    if not all(regions):
        return None
    found = [region for region in regions if region]
    if " and " in text and len(found) == 2:
        ends = [region.parts[0] for region in found]
        low = [end for end in ends if end.high == "∞"]
        high = [end for end in ends if end.low == "-∞"]
        if len(low) == len(high) == 1 and not is_empty(low[0].low, high[0].high):
            joined = Interval(low[0].low, high[0].high, low[0].low_open, high[0].high_open)
            return Region(found[0].variable, (joined,))
    return join_regions(found)


def is_empty(low: str, high: str) -> bool:
    """Whether no number is above the one and below the other: "x < 2 and x > 5" lists two parts."""
    ends = read_number(low), read_number(high)
    return ends[0] is not None and ends[1] is not None and ends[0].value > ends[1].value


def read_inequality(text: str) -> Region | None:
    """x < 3, 3 < x, 1 < x ≤ 4; None when no lone variable is bounded."""
    sides, signs = split_relations(text)
    if not signs or any(sign not in REVERSED and sign != "≠" for sign in signs):
        return None
    if len(signs) == 2:
        low, variable, high = sides
        if not VARIABLE.fullmatch(variable) or signs[0] not in "<≤>≥":
            return None
        if signs[0] in "<≤" and signs[1] in "<≤":
            return Region(variable, (Interval(low, high, signs[0] == "<", signs[1] == "<"),))
        if signs[0] in ">≥" and signs[1] in ">≥":
            return Region(variable, (Interval(high, low, signs[1] == ">", signs[0] == ">"),))
        return None
    if signs == ["≠"] and VARIABLE.fullmatch(sides[0]):
        return Region(sides[0], all_but(sides[1]))
    if len(signs) != 1:
        return None
    left, right, sign = sides[0], sides[1], signs[0]
    if "|" in text:
        return read_absolute(sides, sign)
    if FUNCTION_NAME.fullmatch(left):
        left = "y"
    if not VARIABLE.fullmatch(left):
        left, right, sign = right, left, REVERSED[sign]
    if not VARIABLE.fullmatch(left) or re.search(r"(?<![\\A-Za-z])" + re.escape(left) + r"(?![A-Za-z])", right):
        return None
    if sign in "<≤":
        return Region(left, (Interval("-∞", right, True, sign == "<"),))
    return Region(left, (Interval(right, "∞", sign == ">", True),))


def all_but(value: str) -> tuple[Interval, ...]:
    """All numbers but one."""
    return Interval("-∞", value, True, True), Interval(value, "∞", True, True)


def join_regions(regions: Sequence[Region]) -> Region:
    """The union."""
    variable = next((region.variable for region in regions if region.variable), "")
    return Region(variable, tuple(part for region in regions for part in region.parts))


def relation_of(region: Region) -> Relation | None:
    """The inequality that a half-line of a named variable is; None of other regions."""
    if not region.variable or len(region.parts) != 1:
        return None
    [part] = region.parts
    if part.low == "-∞":
        return Relation(region.variable, "<" if part.high_open else "≤", part.high)
    return Relation(region.variable, ">" if part.low_open else "≥", part.low) if part.high == "∞" else None
