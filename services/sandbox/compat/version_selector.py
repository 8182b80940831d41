"""Selectors of versions as npm writes them: 3.x, ^3.10, ~3.10.2, >=3.8 <4, *, alternatives with ||."""

from __future__ import annotations

import re

Version = tuple[int, int, int]

_COMPARATOR = re.compile(
    r"(?P<sign>[\^~=v]|>=|<=|>|<)?(?P<major>\d{1,9}|[xX*])(?:\.(?P<minor>\d{1,9}|[xX*]))?(?:\.(?P<patch>\d{1,9}|[xX*]))?"
)


def selects(selector: str, version: str) -> bool:
    """Whether the selector takes the version, of which the first dotted number counts; no selector takes nothing."""
    number = re.search(r"\d{1,9}(?:\.\d{1,9})*", version)
    if number is None:
        return False
    return any(_takes_all(part, _pad(number[0].split("."))) for part in selector.split("||"))


def _takes_all(comparators: str, version: Version) -> bool:
    # A sign may stand apart from its number.
    parts = re.sub(r"([\^~=<>])\s+", r"\1", comparators).split()
    return all(_takes(part, version) for part in parts)


def _takes(comparator: str, version: Version) -> bool:
    match = _COMPARATOR.fullmatch(comparator)
    if match is None:
        return False
    given: list[str] = []
    for part in (match["major"], match["minor"], match["patch"]):
        if part is None or not part.isdigit():
            break
        given.append(part)
    low, sign = _pad(given), match["sign"]
    if not given:
        return sign not in ("<", ">")
    if sign in (">", "<", ">=", "<="):
        after = _next(low, len(given))
        return {">": version >= after, ">=": version >= low, "<": version < low, "<=": version < after}[sign]
    if sign == "^":
        fixed = next((place for place, part in enumerate(low[: len(given)], 1) if part), len(given))
        return low <= version < _next(low, fixed)
    if sign == "~":
        return low <= version < _next(low, min(len(given), 2))
    return low <= version < _next(low, len(given))


def _next(version: Version, places: int) -> Version:
    """The first version that differs in the given number of leading places."""
    kept = [*version[: places - 1], version[places - 1] + 1]
    return _pad([str(part) for part in kept])


def _pad(parts: list[str]) -> Version:
    major, minor, patch = (*(int(part) for part in parts[:3]), 0, 0, 0)[:3]
    return major, minor, patch
