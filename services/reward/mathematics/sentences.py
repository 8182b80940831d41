"""Cuts a response into paragraphs, lines and sentences."""

from __future__ import annotations

import re
from dataclasses import dataclass

from services.reward.mathematics.formulas import SPAN

PROSE = re.compile(r"(?<![\\A-Za-z])[a-z]{3}")
END = re.compile(
    r"(?<=[^\s.?])(?:(?:(?<![0-9])\.+|\.(?!\.))(?=[*_)\"']{0,3}\s+(?:[A-Z\\$*(#0-9−_]|[a-z] ?[=<>≤≥])|\s*$)"
    r"|\.{3,}(?=[*_)\"']{0,3}\s+[A-Z])"
    r"|(?<!!)[!?]+(?!\.)(?=\s+[A-Z$*#(]|\s*$))[*_]{0,3}"
)
FINAL = re.compile(r"(?:(?<![0-9.])\.+|(?<=[0-9])\.|(?<=[0-9]\.{3})\.|(?<!!)[!?]+)(?=[*_]*\s*$)")
# A full stop after these ends no sentence, and neither does one after a number or a letter that counts items.
ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|St|vs|cf|approx|resp|ca|Eq|Fig|No|e\.g|i\.e|etc|a\.m|p\.m)|^\W*(?:[0-9]{1,2}|[A-Za-z]))$"
)


@dataclass(frozen=True)
class Sentence:
    """A sentence, or a line without prose, as written; `is_finished` tells whether its end is marked."""

    text: str
    line: int
    paragraph: int
    is_finished: bool


def split_sentences(text: str) -> list[Sentence]:
    """All sentences of a text, those that are empty or a rule aside."""
    sentences: list[Sentence] = []
    paragraph = 0
    for number, line in enumerate(text.splitlines()):
        if not line.strip():
            paragraph += 1
        elif line.strip(" \t*#`_-=|:"):
            sentences += [
                Sentence(piece, number, paragraph, is_finished) for piece, is_finished in split_line(line.strip())
            ]
    return sentences


def split_line(line: str) -> list[tuple[str, bool]]:
    """The sentences of a line, each with whether it ends as a sentence does."""
    if not PROSE.search(line):
        return [(line, True)]  # a final exclamation mark is a factorial
    pieces, begin = [], 0
    for end in find_ends(line):
        if line[begin : end.end()].strip():
            pieces.append((line[begin : end.end()].strip(), True))
        begin = end.end()
    rest = line[begin:].strip()
    return [*pieces, (rest, rest[-1:] in ".!?:)*_`|$✓")] if rest else pieces


def find_ends(line: str) -> list[re.Match[str]]:
    """The marks that end the sentences of a line; inside of a formula there is none."""
    formulas = [match.span() for match in SPAN.finditer(line)] if "$" in line else []
    return [
        match
        for match in END.finditer(line)
        if not any(start < match.start() < stop for start, stop in formulas)
        and not (match[0].startswith(".") and ABBREVIATION.search(line[max(0, match.start() - 12) : match.start()]))
    ]


def first_sentence(line: str) -> str:
    """The line up to the end of its first sentence, without the mark that ends it."""
    for end in find_ends(line):
        if line[: end.start()].strip():
            return line[: end.end()] if end[0].startswith("...") else line[: end.start()]
    return line


def strip_end(sentence: str) -> str:
    """A sentence without the mark that ends it; "8!" and "0.3..." are numbers."""
    if not PROSE.search(sentence):
        return re.sub(r"(?<!\.)\.([*_]*)\s*$", r"\1", sentence)
    return FINAL.sub("", sentence).strip()
