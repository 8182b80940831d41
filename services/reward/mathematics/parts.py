"""Fractions in words that a clause says to be what is left, done or asked for: "so a third of the race is left"."""

from __future__ import annotations

import re

from services.reward.mathematics.number_words import read_number_words

PART = r"(?:half|thirds?|quarters?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?)"
COUNT = r"(?:an?|one|two|three|four|five|six|seven|eight|nine)"
SAID = re.compile(
    r"(?P<lead>^\W*|[,;]\s+(?:and\s+)?|\b(?:leaves|leaving|remaining is)\s+)"
    r"(?P<opening>(?:(?:so|thus|hence|therefore|then|this leaves|that leaves),?\s+)?(?:(?:only|exactly|just)\s+)?)"
    rf"(?P<part>(?:{COUNT}[ -])?{PART})(?=\s+(?:of\s+(?:the|it|them|his|her|their|its|all)\b[^.,;0-9]*"
    r"|(?:is|are|was|were|remains?)\b[^.,;0-9]*)?$)",
    re.IGNORECASE,
)


def name_part(sentence: str) -> str:
    """The sentence with the fraction in figures, where nothing but what it is a part of follows it."""
    match = SAID.search(sentence)
    if match is None or (match["lead"].strip() and not match["opening"] and not match["lead"].strip().isalpha()):
        return sentence
    value = read_number_words(match["part"])
    return f"{sentence[: match.start('part')]}{value}{sentence[match.end() :]}" if value else sentence
