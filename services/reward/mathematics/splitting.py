"""Cuts answers at separators and relations outside of brackets."""

from __future__ import annotations

import re

from services.reward.mathematics.normalise import CLOSING, OPENING

SEPARATOR = re.compile(r"\s*[,;]\s*(?:(?:and|or)\b\s*)?|\s+(?:and|or)\s+|\s*;\s*")
RELATION = re.compile(r"[=≈<>≤≥≠∈]")


def matching(text: str, opening: int) -> int:
    """Where the bracket at `opening` closes, whatever kind closes it; -1 when nothing does."""
    depth = 0
    for position in range(opening, len(text)):
        depth += (text[position] in OPENING) - (text[position] in CLOSING)
        if depth == 0:
            return position
    return -1


def split_top(text: str) -> list[str]:
    """The items of a list without brackets; one item when it is none."""
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
    """The sides of a chain of relations and the signs between them."""
    sides, signs, begin, depth = [], [], 0, 0
    for position, character in enumerate(text):
        depth += (character in OPENING) - (character in CLOSING)
        if depth == 0 and RELATION.match(character):
            sides.append(text[begin:position].strip())
            signs.append(character)
            begin = position + 1
    return [*sides, text[begin:].strip()], signs


def split_sign(text: str, sign: str) -> list[str]:
    """The parts of the text between the signs outside of brackets."""
    parts, begin, depth = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in OPENING) - (character in CLOSING)
        if depth == 0 and character == sign:
            parts.append(text[begin:position].strip())
            begin = position + 1
    return [*parts, text[begin:].strip()]


def strip_outer(text: str) -> str:
    """The text without a pair of braces or a trailing separator around all of it."""
    text = text.strip(" ,;")
    while text[:1] == "{" and matching(text, 0) == len(text) - 1 and not re.search(r"[,:<>≤≥]", text):
        text = text[1:-1].strip()
    return text


def drop_conditions(items: list[str]) -> list[str]:
    """The items without those that say when the first holds, "x + 3, x ≠ 3"."""
    if len(items) < 2 or split_relations(items[0])[1]:
        return items
    signs = [split_relations(item)[1] for item in items[1:]]
    return items[:1] if all(sign and sign[0] in "≠<>≤≥∈" for sign in signs) else items
