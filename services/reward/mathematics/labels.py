"""Values with words that tell them apart: "quotient 15, remainder 7", "11 nickels and 9 dimes"."""

from __future__ import annotations

import re
from collections.abc import Sequence

from services.reward.mathematics.units import is_unit_phrase

VALUE = (
    r"[-−+$€£]{0,2}[0-9]+(?:[.,/][0-9]+)*(?:\s*%|\s*°|\s*\\?pi\b|π)?(?:/[0-9]+)?|(?:\\pi\b|π)(?:/[0-9]+)?|\([^()]*\)"
)
BEFORE = re.compile(
    rf"(?:the\s+)?(?P<label>[A-Za-z]{{2,}}(?:\s+[A-Za-z]{{2,}}){{0,2}})\s*(?:=|:|\bis\b|\bare\b|\bof\b"
    rf"|\bat\b)?\s*(?P<value>(?:{VALUE})(?:\s+\S+)?)"
)
AFTER = re.compile(rf"(?P<value>{VALUE})\s+(?P<label>[A-Za-z]{{2,}}(?:\s+[A-Za-z]{{2,}}){{0,2}})")
REMAINDER = re.compile(r"\b([0-9]+),?\s*(?:with\s+|and\s+)?(?:a\s+)?(?:remainder|rem\.?|r|R)\s*(?:of\s+|=\s*)?([0-9]+)")
DIVISION = ("quotient", "remainder")
ARTICLE = re.compile(r"^(?:an?|the)\s+")


def read_labels(items: Sequence[str]) -> dict[str, str] | None:
    """The values of items under the words that each has; None unless all have one, and all different ones.

    Units are no such words: "4 cm and 9 cm".
    """
    found = {}
    for item in items:
        before, after = BEFORE.fullmatch(item.strip()), AFTER.fullmatch(item.strip())
        match = before or after
        if match is None or (before is None and is_unit_phrase(match["label"])):
            return None
        found[name_of(match["label"])] = match["value"]
    return found if len(found) == len(items) > 1 else None


def name_of(label: str) -> str:
    """A word in lower case and the singular."""
    label = ARTICLE.sub("", label.lower())
    return label[:-1] if label.endswith("s") and not label.endswith("ss") else label


def match_labels(wanted: dict[str, str], given: dict[str, str]) -> tuple[str, ...] | None:
    """The given values in the order of the wanted labels, "max" for "maximum"; None where the labels are others."""
    values = []
    for label in wanted:
        same = [name for name in given if name.startswith(label[:3]) and (name in label or label in name)]
        if len(same) != 1:
            return None
        values.append(given[same[0]])
    return tuple(values) if len(values) == len(given) else None


def read_division(text: str) -> tuple[str, str] | None:
    """Quotient and remainder as labelled items, of "15 remainder 7" and "15 R 7"; None of anything else."""
    match = REMAINDER.fullmatch(text)
    return (f"quotient {match[1]}", f"remainder {match[2]}") if match else None


def find_labelled(sentence: str, labels: Sequence[str]) -> dict[str, str] | None:
    """What a sentence says of each label: the value before it, "11 nickels", or the next one after it."""
    division = REMAINDER.search(sentence) if tuple(labels) == DIVISION else None
    if division:
        return dict(zip(DIVISION, division.groups(), strict=True))
    found = {}
    for label in labels:
        value = value_of_label(sentence, label)
        if value is None:
            return None
        found[label] = value
    return found


def value_of_label(sentence: str, label: str) -> str | None:
    """The value of one label; None where the sentence does not have it."""
    place = re.search(rf"\b{re.escape(label)}{'[a-z]*' if len(label) > 2 else ''}\b", sentence, re.IGNORECASE)
    if place is None:
        return None
    before = re.search(rf"({VALUE})\s+$", sentence[max(0, place.start() - 40) : place.start()])
    if before:
        return before[1]
    after = re.match(rf"[^.;0-9(]{{0,40}}?({VALUE})(\s?[A-Za-z²³°/]+)?", sentence[place.end() :])
    if after is None:
        return None
    unit = (after[2] or "").strip()
    return f"{after[1]} {unit}" if unit and is_unit_phrase(unit) else after[1]
