"""Finds the stretches of a sentence that read as mathematics."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from services.reward.mathematics.formulas import SPAN
from services.reward.mathematics.number_words import PARTS, is_number_word
from services.reward.mathematics.units import POWER_WORDS, is_unit_phrase

FIGURE = re.compile(r"(\\(?:triangle|angle|overline|overrightarrow))\s+([A-Z]{1,4})\b")
SIGN = re.compile(
    r"[0-9=<>*×·⋅÷∪∩∈≈≠≡^\\√∛π∞±≤≥∪ℝℤℕ½¼¾⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ°%$€£{}]|^[-+−][A-Za-z]|[A-Za-z)][-+/][A-Za-z(]|[a-z]\([a-z]\)"
)
LETTER = re.compile(r"[-−(\[|]*[A-Za-zα-ω](?:_\{?[A-Za-z0-9]+\}?|')?[)\]|]*")
CALL = re.compile(r"[A-Za-z]+'?\(.*\)")
FUNCTION = re.compile(r"(?:sin|cos|tan|cot|sec|csc|ln|log|exp|sqrt|pi|abs|infinity|inf)(?![A-Za-z])")
SYMBOL = re.compile(r"[-−:+|()!/]+")
LEADING = ("negative", "minus")
JOINING = ("or", "and", "to", "in", "plus", "over")
# A letter at the end after such a word is what something is, "the conjugate of 1/i is i".
STATES = ("is", "equals", "gives", "be", "=")
ARTICLES = ("a", "A", "I")
UNIT_PARTS = (*POWER_WORDS, "per")
TRIMMED = " \t\n*`_\"'"


class Kind(Enum):
    """How a word reads: as mathematics, as something that mathematics may contain, or as prose."""

    MATHEMATICS = 0
    NUMBER_WORD = 1
    LETTER = 2
    ARTICLE = 3
    LEADING = 4
    JOINING = 5
    SYMBOL = 6
    UNIT = 7
    PART = 8
    PROSE = 9


# What a stretch of mathematics does not begin with, unless it leads to something.
LOOSE = (Kind.JOINING, Kind.UNIT, Kind.ARTICLE, Kind.LETTER, Kind.SYMBOL, Kind.PART)


@dataclass(frozen=True)
class Word:
    """A word and where it begins."""

    text: str
    start: int
    kind: Kind


@dataclass(frozen=True)
class Run:
    """A stretch of mathematics, and where it is in its sentence; `has_sign` tells it from number words alone."""

    text: str
    start: int
    end: int
    has_sign: bool


def find_runs(sentence: str, *, keeps_colons: bool = False) -> list[Run]:
    """The longest stretches of words that read as mathematics.

    A colon after prose ends one, "after two years: 324", unless colons belong to the answer.
    """
    words = split_words(sentence)
    if len(words) > 1 and words[-1].kind in (Kind.LETTER, Kind.ARTICLE) and words[-2].text in STATES:
        words[-1] = replace(words[-1], kind=Kind.MATHEMATICS)
    runs: list[Run] = []
    begin, has_prose = 0, False
    for position, word in enumerate(words):
        has_prose = has_prose or word.kind in (Kind.PROSE, Kind.NUMBER_WORD)
        if word.kind is Kind.PROSE:
            runs += read_run(drop_next_subject(words[begin:position]))
            begin = position + 1
        elif word.text.endswith(":") and has_prose and not keeps_colons:
            runs += read_run(words[begin : position + 1])
            begin = position + 1
    return runs + read_run(words[begin:])


def drop_next_subject(words: Sequence[Word]) -> Sequence[Word]:
    """The words before prose without the subject of the next clause: "2 and y" of "x is 2 and y is 5"."""
    kinds = [word.kind for word in words[-2:]]
    return words[:-2] if kinds == [Kind.JOINING, Kind.LETTER] else words


def read_run(words: Sequence[Word]) -> list[Run]:
    """The stretch that words without prose are, if any."""
    start, stop = trim_run(words)
    kinds = [word.kind for word in words[start:stop]]
    if Kind.MATHEMATICS not in kinds and Kind.NUMBER_WORD not in kinds:
        return []
    last = words[stop - 1]
    text = " ".join(word.text for word in words[start:stop])
    return [Run(text, words[start].start, last.start + len(last.text), Kind.MATHEMATICS in kinds)]


def trim_run(words: Sequence[Word]) -> tuple[int, int]:
    """The bounds of a stretch without the words at its ends that belong to the prose around it."""
    start, stop = 0, len(words)
    while start < stop and words[start].kind in LOOSE:
        word = words[start]
        is_amount = word.kind is Kind.UNIT and word.text.isupper()
        follows = words[start + 1].text if start + 1 < stop else ""
        is_left_side = word.kind in (Kind.ARTICLE, Kind.LETTER) and not follows[:1].isalnum()
        if is_amount or word.text[0] in "-−([{+|" or (is_left_side and follows):
            break
        start += 1
    while start < stop and words[stop - 1].kind in (Kind.JOINING, Kind.LEADING, Kind.ARTICLE):
        stop -= 1
    return start, stop


def split_words(sentence: str) -> list[Word]:
    """The words of a sentence.

    White space inside of formulas, braces, environments and P(A or B) does not part them.
    """
    sentence = FIGURE.sub(lambda match: f"{match[1]}{{{match[2]}}}"[: len(match[0])], sentence)
    formulas = {match.start(): match.end() for match in SPAN.finditer(sentence)} if "$" in sentence else {}
    words: list[Word] = []
    word, depth, calls, closed = "", 0, 0, 0
    for position, character in enumerate(sentence):
        closed = max(closed, formulas.get(position, 0))
        opens = character == "{" or (character == "(" and (calls or (word[-1:].isalpha() and depth == 0)))
        calls += character == "(" and opens
        closes = character == "}" or (character == ")" and calls > 0)
        calls -= character == ")" and closes
        depth = max(0, depth + opens - closes)
        if character == "\\":
            depth = max(0, depth + sentence.startswith("\\begin{", position) - sentence.startswith("\\end{", position))
        if character.isspace() and depth == 0 and position >= closed:
            words += [Word(word, position - len(word), kind_of(word))] if word else []
            word = ""
        else:
            word += character
    return [*words, Word(word, len(sentence) - len(word), kind_of(word))] if word else words


def kind_of(word: str) -> Kind:
    """How a word reads."""
    if "$" in word and (formula := SPAN.fullmatch(word.strip(".,;:()!?*"))):
        inner = formula[1].strip()
        return Kind.LETTER if LETTER.fullmatch(inner) or CALL.fullmatch(inner) else Kind.MATHEMATICS
    bare = word.strip(".,;:()!?*")
    lower = bare.lower()
    if SIGN.search(word) or FUNCTION.match(bare):
        return Kind.MATHEMATICS
    if is_number_word(lower):
        return Kind.NUMBER_WORD
    if not bare or SYMBOL.fullmatch(word):
        return Kind.SYMBOL
    if lower in LEADING and not word.endswith(":"):
        return Kind.LEADING
    if lower in JOINING:
        return Kind.JOINING
    if bare in ARTICLES:
        return Kind.ARTICLE
    if LETTER.fullmatch(bare) or CALL.fullmatch(word.rstrip(".,;:")):
        return Kind.LETTER
    if lower in PARTS:
        return Kind.PART
    return Kind.UNIT if is_unit_phrase(bare) or lower in UNIT_PARTS else Kind.PROSE


def balance(run: str) -> str:
    """The run without a bracket at its end that opened outside of it, or at its begin that closes outside."""
    while run and run[-1] in ")]}" and run[-2:-1] != "'" and sum(map(run.count, ")]}")) > sum(map(run.count, "([{")):
        run = run[:-1].rstrip(",;:.\"' ")
    while run and run[0] in "([{" and sum(map(run.count, "([{")) > sum(map(run.count, ")]}")):
        run = run[1:].lstrip()
    return run
