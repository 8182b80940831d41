"""Reads vectors that are written with the unit vectors i, j and k."""

from __future__ import annotations

import re

from services.reward.mathematics.brackets import scale_items
from services.reward.mathematics.numbers import read_number

LETTERS = "ijk"
HATS = re.compile(r"\\(?:hat|widehat|bar|vec)\s*(?:\{\s*\\?([ijk])(?:math)?\s*\}|\s\\?([ijk])(?:math)?(?![a-z]))")
UNIT_VECTORS = str.maketrans({"î": "i", "ĵ": "j"})
DIVIDED = re.compile(
    r"\\frac\{(?P<inner>[^{}]*)\}\{(?P<under>[^{}]*)\}|\((?P<inner2>[^()]*)\)\s*/\s*(?P<under2>[0-9]+)"
)
FACTORED = re.compile(r"(?P<factor>.+?)\s*\*?\s*\((?P<inner>[^()]*[ijk][^()]*)\)")
TERM = re.compile(r"\s*(?P<sign>[+-]?)\s*(?P<body>[^+-]*?)\s*\*?\s*(?P<letter>[ijk])\s*(?=[+-]|$)")


def read_basis(text: str, count: int) -> tuple[str, ...] | None:
    """The components of "3i - 4j" as `count` texts; None of what is no such sum, and of i alone, which is complex.

    Each unit vector stands once and behind its component.
    """
    text = HATS.sub(lambda match: match[1] or match[2], text.translate(UNIT_VECTORS)).strip()
    if not 2 <= count <= len(LETTERS) or not re.search(r"[jk]", text):
        return None
    divided = DIVIDED.fullmatch(text)
    if divided:
        over, under = divided["inner"] or divided["inner2"], divided["under"] or divided["under2"]
        return read_basis(f"\\frac{{1}}{{{under}}}({over})", count)
    factored = FACTORED.fullmatch(text)
    if factored:
        factor, inner = read_number(factored["factor"]), read_basis(factored["inner"], count)
        return scale_items(factor, inner) if factor and inner else None
    found: dict[str, str] = {}
    position = 0
    while position < len(text):
        term = TERM.match(text, position)
        if term is None or term["letter"] in found or (position and not term["sign"]):
            return None
        if re.search(r"(?<![\\A-Za-z])[ijk](?![A-Za-z])", term["body"]):
            return None
        found[term["letter"]] = term["sign"].replace("+", "") + (term["body"] or "1")
        position = term.end()
    if any(letter not in LETTERS[:count] for letter in found):
        return None
    return tuple(found.get(letter, "0") for letter in LETTERS[:count])
