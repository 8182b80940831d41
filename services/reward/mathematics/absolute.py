"""Reads |x - a| < b as the interval that it is, and |x - a| > b as the two half-lines."""

from __future__ import annotations

import re
from collections.abc import Sequence

from services.reward.mathematics.names import VARIABLE
from services.reward.mathematics.numbers import Number, read_number
from services.reward.mathematics.shapes import REVERSED, Interval, Region

INSIDE = re.compile(r"\|\s*(?P<name>[A-Za-z]|\\[a-z]+)\s*(?:(?P<sign>[-+])\s*(?P<centre>[^|A-Za-z+-]+))?\s*\|")


def read_absolute(sides: Sequence[str], sign: str) -> Region | None:
    """The region that an absolute value bounds; None of anything but a variable, less a number, against a number."""
    left, right = (side.strip() for side in sides)
    if not left.startswith("|"):
        left, right, sign = right, left, REVERSED.get(sign, sign)
    match = INSIDE.fullmatch(left)
    if match is None or not VARIABLE.fullmatch(match["name"]) or "|" in right or sign not in REVERSED:
        return None
    bound = read_number(right)
    centre = read_number(match["centre"]) if match["centre"] else Number(value=0 * bound.value) if bound else None
    ends = (f"-({right})", right)
    if bound is not None:
        if bound.value < 0 or centre is None:
            return None
        middle = centre.value if match["sign"] == "-" else -centre.value
        ends = str(middle - bound.value), str(middle + bound.value)
    elif match["centre"] or re.search(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])|^\s*-", right):
        return None
    is_open = sign in "<>"
    if sign in "<≤":
        return Region(match["name"], (Interval(*ends, is_open, is_open),))
    outer = Interval("-∞", ends[0], True, is_open), Interval(ends[1], "∞", is_open, True)
    return Region(match["name"], outer)
