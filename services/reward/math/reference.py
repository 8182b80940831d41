"""Reading of references: what one asks for, and whether it can be read at all."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from services.reward.math.notation import MAX_DEPTH, nesting, normalise
from services.reward.math.numbers import read_number
from services.reward.math.parse import Assignment, Group, read_shape
from services.reward.math.units import read_quantity
from services.reward.math.words import has_words, is_empty_set, is_wordy

MAX_CHARACTERS = 2000


@dataclass(frozen=True)
class Asked:
    """Number of values of a reference, and whether it is words."""

    parts: int = 1
    is_verbal: bool = False


@lru_cache(maxsize=1024)
def describe(reference: str) -> Asked:
    """Returns what a reference asks for."""
    text = normalise(reference)
    body = read_quantity(text).body
    if read_number(body) is not None or len(text) > MAX_CHARACTERS:
        return Asked()
    if is_wordy(text) or is_empty_set(text) or has_words(body):
        return Asked(is_verbal=True)
    shape = read_shape(text)
    shape = read_shape(shape.value) if isinstance(shape, Assignment) else shape
    return Asked(parts=max(1, len(shape.items))) if isinstance(shape, Group) else Asked()


def check_reference(reference: str) -> str:
    """Returns why no answer could match a reference, as the end of a sentence about it; empty where one could."""
    if not reference.strip():
        return "is empty: give the answer to compare with"
    if nesting(reference) > MAX_DEPTH:
        return f"nests brackets more than {MAX_DEPTH} deep"
    text = normalise(reference)
    if not re.sub(r"[\s${}\\,.;:]", "", reference):
        return "holds no value after its markup is taken off"
    if any(command in text for command in ("\\frac{}", "\\sqrt{}", "\\binom{}")) or text.endswith("\\frac"):
        return "has a command without its argument"
    braces = re.sub(r"\\[{}]", "", reference)
    if braces.count("{") != braces.count("}") and not has_words(text):
        return "has braces that do not close"
    return ""
