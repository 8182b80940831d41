"""Reads answers that hold for every integer: "x = pi/2 + n pi, n ∈ ℤ", "(3t, -2t) for integers t", "n ≡ 2 (mod 5)"."""

from __future__ import annotations

import re
from dataclasses import dataclass

from services.reward.mathematics.assignments import expand_items, read_names, right_side
from services.reward.mathematics.normalise import normalise
from services.reward.mathematics.reading import read_shape
from services.reward.mathematics.shapes import Assignment, Group
from services.reward.mathematics.splitting import split_top

LETTERS = r"(?<![\\A-Za-z])(?P<letters>(?P<letters1>[A-Za-z])(?:\s*,\s*(?!(?P=letters1))[A-Za-z]){0,2})"
INTEGERS = r"(?:\\mathbb\s*\{?\s*Z\s*\}?|\\mathbf\s*\{?Z\}?|ℤ|Z(?![A-Za-z]))"
REALS = r"(?:ℝ|\\mathbb\s*\{?\s*R\s*\}?|R(?![A-Za-z]))"
LEADING = r"[\s,;:|(]*(?:\b(?:for|where|with|and|as)\b\s*)?(?:\b(?:all|any|some|each|every|an?|arbitrary)\b\s*)*"
INTEGER = re.compile(
    LEADING
    + (
        rf"(?:{LETTERS}\s*(?:∈\s*{INTEGERS}|\s(?:is|are|being)\s+(?:an?|any|all)?\s*(?:arbitrary\s+)?integers?"
        rf"|any integer|integer)"
    )
    + rf"|{LETTERS.replace('letters', 'listed')}\s*=\s*(?:…,?\s*)?[-±0-9, ]*(?:…|±\s*[0-9])"
    + rf"|integers?\s+{LETTERS.replace('letters', 'others')})[\s)]*"
)
REAL = re.compile(
    LEADING + rf"(?:{LETTERS}\s*∈\s*{REALS}|real(?: numbers?)?\s+{LETTERS.replace('letters', 'others')})[\s)]*"
)
NARROWER = re.compile(r"≥|>|<|≤|\b(?:positive|non-?negative|natural|even|odd)\b|ℕ|\\mathbb\s*\{?\s*N")
CONGRUENCE = re.compile(
    r"\$?\s*([A-Za-z])\s*(?:\\equiv|≡)\s*([-−0-9,\s]+?(?:(?:or|and)\s+[-−0-9]+)?)\s*"
    r"(?:\\pmod\s*\{?\s*([0-9]+)\s*\}?|\(\s*(?:\\bmod|\\mod|mod)\s*([0-9]+)\s*\)|\\?mod\s*([0-9]+))\s*\$?\.?"
)
# The words and signs without which a reference is no family: a cheap look before a dear one.
MAY_BE_FAMILY = re.compile(r"integer|real|\\in\b|∈|\\equiv|≡")


@dataclass(frozen=True)
class Family:
    """Expressions, or tuples of them, for every value of their parameters; no parameters where none are told."""

    members: tuple[tuple[str, ...], ...]
    parameters: tuple[str, ...] = ()
    is_real: bool = False


def find_families(reference: str, answer: str) -> tuple[Family, Family] | None:
    """Both as families where one of them says what its parameters range over."""
    if MAY_BE_FAMILY.search(reference) and (family := read_family(reference)):
        given = read_answer_family(answer)
        return None if given is None else (family, given)
    if MAY_BE_FAMILY.search(answer) and re.search(r"[a-z]", reference) and (given := read_family(answer)):
        wanted = read_answer_family(reference)
        return None if wanted is None else (wanted, given)
    return None


def read_family(text: str) -> Family | None:
    """The family that a reference describes; None of one that names no parameters with what they range over."""
    congruence = read_congruence(text)
    if congruence is not None:
        return congruence
    text = normalise(text)
    found = INTEGER.search(text) or REAL.search(text)
    if found is None:
        return None
    rest = (text[: found.start()] + text[found.end() :]).strip(" ,;:.")
    if NARROWER.search(rest) or not rest:
        return None
    names = next(name for name in found.groups() if name).replace(" ", "").split(",")
    uses = all(re.search(rf"(?<![\\A-Za-z]){name}(?![A-Za-z])|(?<=[0-9i]){name}(?![A-Za-z])", rest) for name in names)
    members = read_members(rest) if uses else None
    return Family(members, tuple(names), found.re is REAL) if members else None


def read_answer_family(text: str) -> Family | None:
    """The family that an answer describes, even where it does not say what its parameters are."""
    family = read_family(text)
    if family is not None:
        return family
    text = normalise(text)
    members = None if NARROWER.search(text) else read_members(text)
    return Family(members) if members else None


def read_congruence(text: str) -> Family | None:
    """The numbers of one or several classes of remainders."""
    match = CONGRUENCE.fullmatch(text.strip())
    if match is None:
        return None
    classes = re.findall(r"[-−]?[0-9]+", match[2])
    modulus = match[3] or match[4] or match[5]
    return Family(tuple((f"{each.replace('−', '-')}+{modulus}k",) for each in classes), ("k",))


def read_members(text: str) -> tuple[tuple[str, ...], ...] | None:
    """The expressions of a family, each of several components where it is a tuple."""
    text = re.sub(r"^[⦃{](.*)[⦄}]$", r"\1", text.strip()).strip(" ,;:|")
    items = split_top(text)
    names = read_names(items)
    if names is not None and len(names) > 1:
        return (tuple(names.values()),)
    members = []
    for item in expand_items(items):
        shape = right_side(read_shape(item))
        if isinstance(shape, Group) and shape.kind == "tuple":
            members.append(shape.items)
        else:
            value = read_shape(item)
            members.append((value.value if isinstance(value, Assignment) else item,))
    return tuple(members) or None
