"""What an answer may be: one value, several, a region, an equation, a matrix."""

from __future__ import annotations

from dataclasses import dataclass

REVERSED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}


@dataclass(frozen=True)
class Scalar:
    """One value, equation aside."""

    text: str


@dataclass(frozen=True)
class Group:
    """Several values: a "list" without brackets, a "set", or a "tuple" in the brackets that `brackets` holds."""

    kind: str
    items: tuple[str, ...]
    brackets: str = ""


@dataclass(frozen=True)
class Interval:
    """The numbers between two ends."""

    low: str
    high: str
    low_open: bool
    high_open: bool


@dataclass(frozen=True)
class Region:
    """A union of intervals, and the variable that it is told of where one is named."""

    variable: str
    parts: tuple[Interval, ...]


@dataclass(frozen=True)
class Assignment:
    """A name and its value."""

    name: str
    value: str


@dataclass(frozen=True)
class Relation:
    """An equation or inequality that is not solved for a name."""

    left: str
    sign: str
    right: str


@dataclass(frozen=True)
class Matrix:
    """Rows of values."""

    rows: tuple[tuple[str, ...], ...]


Shape = Scalar | Group | Region | Assignment | Relation | Matrix
