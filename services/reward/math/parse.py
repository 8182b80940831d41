"""Takes an answer in the notation of `notation` apart: one value, several, an interval, an equation, a matrix."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from services.reward.math.notation import CLOSING, OPENING
from services.reward.math.numbers import is_number_word, read_number

REVERSED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}
SEPARATOR = re.compile(r"\s*[,;]\s*(?:(?:and|or)\b\s*)?|\s+(?:and|or)\s+|\s*;\s*")
RELATION = re.compile(r"[=≈<>≤≥≠∈]")
MATRIX = re.compile(r"^\\begin\{([pbvBV]?matrix|array)\}(?:\{[^{}]*\})?((?:(?!\\end\{\1\}).)*)\\end\{\1\}$", re.DOTALL)
# A point with its name, "V(3, 4)".
POINT = re.compile(r"[A-Z]'?_?[0-9]?\s*(\([^()]*,[^()]*\))")
VARIABLE = re.compile(r"[A-Za-z]'?(?:_\{?[A-Za-z0-9]+\}?)?'*|\\(?!pi\b|frac\b|sqrt\b)[A-Za-z]+(?:_\{?[A-Za-z0-9]+\}?)?")
FUNCTION_NAME = re.compile(
    r"[A-Za-z]+'*(?:_\{?[A-Za-z0-9]+\}?)?(?:\^\{[^{}]*\}|\^-1)?\s*\([^=]*\)"
    r"|\\frac\{d[^{}]*\}\{d[^{}]*\}.*|\\(?:int|lim)(?![A-Za-z]).*"
)
WORDY_NAME = re.compile(r"(?:\\(?:angle|triangle|overline)\s*)?\{?[A-Z]{2,4}\}?|[A-Za-z][A-Za-z ]{2,}")
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


@dataclass(frozen=True)
class Scalar:
    """One value."""

    text: str


@dataclass(frozen=True)
class Group:
    """Several values: a "list" without brackets, a "set", or a "tuple" in the brackets that `brackets` holds."""

    kind: str
    items: tuple[str, ...]
    brackets: str = ""


@dataclass(frozen=True)
class Interval:
    """Numbers between two ends."""

    low: str
    high: str
    low_open: bool
    high_open: bool


@dataclass(frozen=True)
class Region:
    """Union of intervals, and its variable where one is named."""

    variable: str
    parts: tuple[Interval, ...]


@dataclass(frozen=True)
class Assignment:
    """Name and its value."""

    name: str
    value: str


@dataclass(frozen=True)
class Relation:
    """Equation or inequality that is not solved for a name."""

    left: str
    sign: str
    right: str


@dataclass(frozen=True)
class Matrix:
    """Rows of values."""

    rows: tuple[tuple[str, ...], ...]


Shape = Scalar | Group | Region | Assignment | Relation | Matrix


def matching(text: str, opening: int) -> int:
    """Returns where the bracket at `opening` closes, whatever kind closes it; -1 when nothing does."""
    depth = 0
    for position in range(opening, len(text)):
        depth += (text[position] in OPENING) - (text[position] in CLOSING)
        if depth == 0:
            return position
    return -1


def split_top(text: str) -> list[str]:
    """Returns the items of a list without brackets; one item when it is none."""
    items, begin, position, depth = [], 0, 0, 0
    while position < len(text):
        match = SEPARATOR.match(text, position) if depth == 0 else None
        if match:
            items.append(text[begin:position])
            begin = position = match.end()
        else:
            depth += (text[position] in OPENING) - (text[position] in CLOSING)
            position += 1
    items.append(text[begin:])
    return [item.strip() for item in items if item.strip()]


def split_relations(text: str) -> tuple[list[str], list[str]]:
    """Returns the sides of a chain of relations and the signs between them."""
    sides, signs, begin, depth = [], [], 0, 0
    for position, character in enumerate(text):
        depth += (character in OPENING) - (character in CLOSING)
        if depth == 0 and RELATION.match(character):
            sides.append(text[begin:position].strip())
            signs.append(character)
            begin = position + 1
    return [*sides, text[begin:].strip()], signs


def split_sign(text: str, sign: str) -> list[str]:
    """Returns the parts of the text between the signs outside of brackets."""
    parts, begin, depth = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in OPENING) - (character in CLOSING)
        if depth == 0 and character == sign:
            parts.append(text[begin:position].strip())
            begin = position + 1
    return [*parts, text[begin:].strip()]


def strip_outer(text: str) -> str:
    """Removes a pair of braces or a trailing separator around all of the text."""
    text = text.strip(" ,;")
    while text[:1] == "{" and matching(text, 0) == len(text) - 1 and not re.search(r"[,:<>≤≥]", text):
        text = text[1:-1].strip()
    return text


def drop_conditions(items: list[str]) -> list[str]:
    """Removes items that say when the first one holds, "x + 3, x ≠ 3"."""
    if len(items) < 2 or split_relations(items[0])[1]:
        return items
    signs = [split_relations(item)[1] for item in items[1:]]
    return items[:1] if all(sign and sign[0] in "≠<>≤≥∈" for sign in signs) else items


def read_brackets(text: str) -> Group | None:
    """Reads a set, a tuple, a vector or a closed interval; None when the text is not bracketed as a whole."""
    if text == "∅" or re.fullmatch(r"[⦃{]\s*[⦄}]", text):
        return Group("set", ())
    point = POINT.fullmatch(text)
    text = point[1] if point else text
    if not text or text[0] not in OPENING or matching(text, 0) != len(text) - 1:
        return None
    items = split_top(text[1:-1])
    if text[0] in "⦃{" and text[-1] in "⦄}":
        return Group("set", tuple(items)) if text[0] == "⦃" or len(items) > 1 else None
    if len(items) < 2:
        return None
    return Group("tuple", tuple(items), text[0] + text[-1])


def read_matrix(text: str) -> Matrix | None:
    """Reads the rows of a LaTeX matrix, or of a list of lists."""
    if text[:1] in "([|" and text[-1:] in ")]|" and text[1:].lstrip().startswith("\\begin"):
        text = text[1:-1].strip()
    match = MATRIX.match(text)
    if match:
        rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", match[2]) if row.strip()]
        return Matrix(tuple(tuple(cell.strip() for cell in row.split("&")) for row in rows))
    group = read_brackets(text)
    if group is None or group.brackets != "[]":
        return None
    inner = [read_brackets(item) for item in group.items]
    if all(row is not None and row.brackets == "[]" for row in inner):
        return Matrix(tuple(row.items for row in inner if row is not None))
    return None


def flatten_vector(matrix: Matrix) -> tuple[str, ...] | None:
    """Returns the cells of a single row or column; None of a matrix."""
    if len(matrix.rows) == 1:
        return matrix.rows[0]
    return tuple(row[0] for row in matrix.rows) if all(len(row) == 1 for row in matrix.rows) else None


def is_name(text: str) -> bool:
    """Returns whether a text names a value: a variable, f(x), angle ABC, (x, y), or words."""
    if any(kind.fullmatch(text) for kind in (VARIABLE, FUNCTION_NAME)) or is_words_name(text):
        return True
    group = read_brackets(text)
    return group is not None and group.kind == "tuple" and all(VARIABLE.fullmatch(item) for item in group.items)


def is_words_name(text: str) -> bool:
    """Returns whether a text names a value in words or as a line of geometry."""
    return bool(WORDY_NAME.fullmatch(text)) and not any(is_number_word(word) for word in text.lower().split())


def read_region(text: str) -> Region | None:
    """Reads a union of intervals, an inequality solved for a variable, several of them, or all real numbers.

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
    """Returns the interval that "(1, 2)" or "[1, 2]" may be."""
    if group is None or len(group.items) != 2 or group.brackets not in ("()", "[]", "(]", "[)"):
        return None
    low, high = group.items
    return Region("", (Interval(low, high, group.brackets[0] == "(", group.brackets[1] == ")"),))


def may_be_intervals(*groups: Group) -> bool:
    """Returns whether all of them can be intervals: two ends in brackets, the second one not below the first."""
    return all(interval_of(group) and not is_empty(*group.items) for group in groups)


def read_inequalities(text: str, items: Sequence[str]) -> Region | None:
    """Reads inequalities of one variable: joined by "and" when one gives each end, else a union."""
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
    """Returns whether no number is above the one and below the other: "x < 2 and x > 5" lists two parts."""
    ends = read_number(low), read_number(high)
    return ends[0] is not None and ends[1] is not None and ends[0].value > ends[1].value


def read_inequality(text: str) -> Region | None:
    """Reads x < 3, 3 < x, 1 < x ≤ 4, x ≠ 2; None when no lone variable is bounded."""
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
    if len(signs) != 1:
        return None
    left, right, sign = sides[0], sides[1], signs[0]
    if sign == "≠":
        names = [side for side in sides if VARIABLE.fullmatch(side)]
        return Region(names[0], all_but(right if names[0] is left else left)) if len(names) == 1 else None
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
    """Returns all numbers but one."""
    return Interval("-∞", value, True, True), Interval(value, "∞", True, True)


def join_regions(regions: Sequence[Region]) -> Region:
    """Returns the union of regions."""
    variable = next((region.variable for region in regions if region.variable), "")
    return Region(variable, tuple(part for region in regions for part in region.parts))


def read_shape(text: str) -> Shape:
    """Reads the shape of an answer in the notation of `normalise`."""
    text = strip_outer(text)
    if "±" in text or "∓" in text:
        plus_minus = read_plus_minus(text)
        if plus_minus is not None:
            return plus_minus
    region = read_region(text)
    if region is not None:
        return region
    items = drop_conditions(split_top(text))
    if len(items) > 1:
        return Group("list", tuple(items))
    text = items[0] if items else text
    matrix = read_matrix(text)
    if matrix is not None:
        return matrix
    return read_brackets(text) or read_relation(text) or Scalar(text)


def read_plus_minus(text: str) -> Group | Assignment | None:
    """Reads the two values of one that holds ±, under its name where it has one; None of a list of several."""
    sides, signs = split_relations(text)
    if len(split_top(text)) > 1 or len(signs) > 1:
        return None
    if signs:
        return Assignment(sides[0], sides[1])
    both = text.replace("±", "+").replace("∓", "-"), text.replace("±", "-").replace("∓", "+")
    return Group("list", tuple(value.removeprefix("+").strip() for value in both))


def drop_approximation(text: str) -> str:
    """Returns the exact side of "36/7 ≈ 5.14", and the rounded one where the other side is only a name."""
    exact, sign, rounded = text.partition("≈")
    value = split_relations(exact)[0][-1]
    return exact.strip() if sign and value and not is_name(value) else (rounded or text).strip()


def read_relation(text: str) -> Assignment | Relation | None:
    """Reads a name with its value, or an equation or inequality; of a chain the first and the last side."""
    sides, signs = split_relations(text)
    if not signs:
        return None
    if all(sign in "=≈" for sign in signs):
        left, right = sides[0], sides[-1]
        if VARIABLE.fullmatch(right) and len(signs) == 1 and not is_name(left):
            left, right = right, left
        return Assignment(left, right) if is_name(left) or not left else Relation(left, "=", right)
    if signs == ["∈"] and is_name(sides[0]):
        return Assignment(sides[0], sides[1])
    return Relation(sides[0], signs[0], sides[1]) if len(signs) == 1 else None
