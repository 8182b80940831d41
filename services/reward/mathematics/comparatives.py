"""Reads inequalities in words: "greater than -2", "at least 1 and less than 4", "between 1 and 4, inclusive"."""

from __future__ import annotations

import re
from dataclasses import dataclass

VALUE = r"(?P<value>[-−+]?\s*(?:[0-9][0-9./]*|\\(?:frac|sqrt|pi)[^\s,;]*|π|√[0-9]+)(?:[π√/][0-9]*)*%?)"
SIGNS = {
    ">": r"(?:strictly\s+)?(?:greater|more|larger|bigger|higher|above|over|exceeds?|exceeding)(?:\s+than)?",
    "<": r"(?:strictly\s+)?(?:less|smaller|lower|fewer|below|under)(?:\s+than)?",
    "≥": r"(?:at least|(?:greater|more|larger) than or equal to|equal to or (?:greater|more|larger) than"
    r"|a minimum of|minimum)",
    "≤": r"(?:at most|(?:less|smaller|lower) than or equal to|equal to or (?:less|smaller|lower) than"
    r"|up to(?: and including)?|a maximum of)",
}
NEGATED = {">": "≤", "<": "≥", "≥": "<", "≤": ">"}
NOT = r"(?P<not>\b(?:not|no|never|cannot be|can't be|cannot|can't|isn't)\s+(?:be\s+)?)?"
BOUND = re.compile(
    NOT
    + r"\b(?:"
    + "|".join(f"(?P<s{position}>{SIGNS[sign]})" for position, sign in enumerate(("≥", "≤", ">", "<")))
    + r")\s+\(?(?:the number\s+)?"
    + VALUE,
    re.IGNORECASE,
)
ORDER = ("≥", "≤", ">", "<")
BETWEEN = re.compile(
    r"\b(?P<word>between|from)\s+\(?" + VALUE + r"\s*(?:and|to)\s+" + VALUE.replace("value", "high"), re.IGNORECASE
)
CLOSED = re.compile(
    r"\binclu(?:sive|ding|ded)|\bboth (?:ends|endpoints|included|are|bounds|values)|including|\bclosed\b",
    re.IGNORECASE,
)
OPEN = re.compile(r"\bstrictly\b|\bexclu(?:sive|ding|ded)|\bnot included|\bexcept|\bopen\b", re.IGNORECASE)
SIGNED = re.compile(
    r"\b(?P<which>non-?negative|non-?positive|positive|negative|non-?zero)\s+(?:real\s+)?(?:numbers?|reals?|values?"
    r"|\$?[a-z]\b)",
    re.IGNORECASE,
)
EXCEPT = re.compile(
    r"\b(?:(?:all|any|every) real|real numbers|everywhere|defined|continuous|all (?:values|numbers"
    r"|x))\b.{0,40}?\b(?:except|but|other than"
    r"|apart from)\s+"
    r"(?:(?:for|at|when|where)\s+)?(?:[a-z]\s*=\s*)?" + VALUE,
    re.IGNORECASE,
)
ALL_REALS = re.compile(r"\b(?:all|any|every)\s+real\s+(?:numbers?|values?|\$?[a-z]\b)", re.IGNORECASE)
# "3 or any larger number".
BEYOND = re.compile(
    VALUE
    + (
        r"\s+(?:or|and)\s+(?:any|all|every)?\s*(?:(?P<up>larger|greater|bigger|higher|more)|smaller|less"
        r"|lower)\b(?!\s+than)"
    ),
    re.IGNORECASE,
)
HALF_LINES = {
    "nonnegative": "[0, ∞)",
    "nonpositive": "(-∞, 0]",
    "positive": "(0, ∞)",
    "negative": "(-∞, 0)",
    "nonzero": "(-∞, 0) ∪ (0, ∞)",
}
SYMBOLS = re.compile(
    r"[<>≤≥≠∪∞]|\\(?:leq?|geq?|neq?|infty|cup|lt|gt)(?![A-Za-z])|[\[(]\s*[-−0-9\\][^()\[\]]*,[^()\[\]]*[)\]]"
)


@dataclass(frozen=True)
class Bound:
    """One inequality, and where its words are."""

    sign: str
    value: str
    start: int
    end: int


def read_comparatives(sentence: str) -> str | None:
    """The interval that a sentence describes in words; None where it uses symbols or describes none."""
    if SYMBOLS.search(sentence):
        return None
    excepted = EXCEPT.search(sentence)
    if excepted:
        return f"x ≠ {excepted['value']}"
    between = BETWEEN.search(sentence)
    if between:
        is_closed = between["word"].lower() == "from" or CLOSED.search(sentence) is not None
        sign = "<" if OPEN.search(sentence) or not is_closed else "≤"
        return builder(f"{between['value']} {sign} x {sign} {between['high']}")
    beyond = BEYOND.search(sentence)
    if beyond:
        return half_line(Bound("≥" if beyond["up"] else "≤", beyond["value"], 0, 0))
    bounds = find_bounds(sentence)
    if not bounds:
        signed = SIGNED.search(sentence)
        if signed:
            return HALF_LINES[signed["which"].lower().replace("-", "")]
        return "ℝ" if ALL_REALS.search(sentence) else None
    if len(bounds) == 1:
        return half_line(bounds[0])
    if len(bounds) > 2:
        return None
    joint = sentence[bounds[0].end : bounds[1].start]
    low, high = sorted(bounds, key=lambda bound: bound.sign in "<≤")
    if re.search(r"\bor\b", joint) or low.sign in "<≤" or high.sign in ">≥":
        return f"{half_line(bounds[0])} ∪ {half_line(bounds[1])}"
    return builder(f"{low.value} {'≤' if low.sign == '≥' else '<'} x {high.sign} {high.value}")


def builder(condition: str) -> str:
    """The set of the numbers with a condition, whatever they are called."""
    return f"⦃x | {condition}⦄"


def find_bounds(sentence: str) -> list[Bound]:
    """Every inequality in words."""
    bounds = []
    for match in BOUND.finditer(sentence):
        sign = next(sign for position, sign in enumerate(ORDER) if match[f"s{position}"])
        bounds.append(Bound(NEGATED[sign] if match["not"] else sign, match["value"], match.start(), match.end()))
    return bounds


def half_line(bound: Bound) -> str:
    """The interval of one inequality."""
    left, right = ("[" if bound.sign == "≥" else "("), ("]" if bound.sign == "≤" else ")")
    return f"{left}{bound.value}, ∞)" if bound.sign in ">≥" else f"(-∞, {bound.value}{right}"
