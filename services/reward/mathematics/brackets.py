"""Reads what is in brackets: sets, tuples, points, vectors, matrices."""

from __future__ import annotations

import re
from collections.abc import Sequence

from services.reward.mathematics.normalise import OPENING
from services.reward.mathematics.numbers import Number, read_number
from services.reward.mathematics.shapes import Group, Matrix
from services.reward.mathematics.splitting import matching, split_top

MATRIX = re.compile(r"^\\begin\{([pbvBV]?matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\}$", re.DOTALL)
# A point with its name, "V(3, 4)".
POINT = re.compile(r"[A-Z]'?_?[0-9]?\s*(\([^()]*,[^()]*\))")


def read_brackets(text: str) -> Group | None:
    """A set, a tuple, a vector or a closed interval; None when the text is not bracketed as a whole."""
    if text == "∅" or re.fullmatch(r"[⦃{]\s*[⦄}]", text):
        return Group("set", ())
    point = POINT.fullmatch(text)
    text = point[1] if point else text
    if not text or text[0] not in OPENING or matching(text, 0) != len(text) - 1:
        return read_scaled(text)
    items = split_top(text[1:-1])
    if text[0] in "⦃{" and text[-1] in "⦄}":
        return Group("set", tuple(items)) if text[0] == "⦃" or len(items) > 1 else None
    if len(items) < 2:
        return None
    return Group("tuple", tuple(items), text[0] + text[-1])


def read_scaled(text: str) -> Group | None:
    """A number times a tuple, "\\frac{1}{5}(3, 4)", as the tuple that it is."""
    opening = max(text.rfind("("), text.rfind("⟨"))
    factor = read_number(text[:opening].rstrip("* ")) if text.endswith((")", "⟩")) and opening > 0 else None
    items = split_top(text[opening + 1 : -1]) if factor else []
    if factor is None or len(items) < 2:
        return None
    return Group("tuple", scale_items(factor, items), "()")


def scale_items(factor: Number, items: Sequence[str]) -> tuple[str, ...]:
    """The items times a factor."""
    numbers = [read_number(item) for item in items]
    return tuple(
        str(factor.value * number.value) if number else f"({factor.value})*({item})"
        for number, item in zip(numbers, items, strict=True)
    )


def read_matrix(text: str) -> Matrix | None:
    """Rows of a LaTeX matrix, or of a list of lists."""
    match = MATRIX.match(strip_array_brackets(text))
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


def strip_array_brackets(text: str) -> str:
    """The array inside of brackets of its own."""
    if text[:1] in "([|" and text[-1:] in ")]|" and text[1:].lstrip().startswith("\\begin"):
        return text[1:-1].strip()
    return text


def flatten_vector(matrix: Matrix) -> tuple[str, ...] | None:
    """The cells of a single row or column; None of a matrix."""
    if len(matrix.rows) == 1:
        return matrix.rows[0]
    return tuple(row[0] for row in matrix.rows) if all(len(row) == 1 for row in matrix.rows) else None
