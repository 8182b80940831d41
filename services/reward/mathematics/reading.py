"""Takes an answer in the notation of `normalise` apart."""

from __future__ import annotations

from services.reward.mathematics.brackets import read_brackets, read_matrix
from services.reward.mathematics.names import is_name
from services.reward.mathematics.numbers import read_number
from services.reward.mathematics.regions import read_region
from services.reward.mathematics.shapes import Assignment, Group, Relation, Scalar, Shape
from services.reward.mathematics.splitting import drop_conditions, split_relations, split_top, strip_outer


def read_shape(text: str) -> Shape:
    """The shape of an answer in the notation of `normalise`."""
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
    """The two values of one that holds ±, under its name where it has one; None of a list of several."""
    sides, signs = split_relations(text)
    if len(split_top(text)) > 1 or len(signs) > 1:
        return None
    if signs:
        return Assignment(sides[0], sides[1])
    both = text.replace("±", "+").replace("∓", "-"), text.replace("±", "-").replace("∓", "+")
    return Group("list", tuple(value.removeprefix("+").strip() for value in both))


def drop_approximation(text: str) -> str:
    """The text without a decimal that rounds an exact value before it: "x = 36/7 ≈ 5.14" is x = 36/7.

    Of two decimals the second one is what the first was rounded to.
    """
    exact, sign, rounded = text.partition("≈")
    value = split_relations(exact)[0][-1]
    if not sign or not value or is_name(value):
        return text
    numbers = read_number(value), read_number(rounded)
    if numbers[0] and numbers[1] and numbers[0].is_decimal and abs(numbers[0].value - numbers[1].value) < 1:
        return rounded.strip()
    return exact.strip()


def read_relation(text: str) -> Assignment | Relation | None:
    """A name with its value, or an equation or inequality; of a chain of equations the first and the last side."""
    sides, signs = split_relations(text)
    if not signs:
        return None
    if all(sign in "=≈" for sign in signs):
        left, right = sides[0], sides[-1]
        return Assignment(left, right) if is_name(left) or not left else Relation(left, "=", right)
    if signs == ["∈"] and is_name(sides[0]):
        return Assignment(sides[0], sides[1])
    return Relation(sides[0], signs[0], sides[1]) if len(signs) == 1 else None
