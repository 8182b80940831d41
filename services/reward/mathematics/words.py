"""Answers that are words: yes, Thursday, no solution."""

from __future__ import annotations

import re

from services.reward.mathematics.number_words import read_number_words
from services.reward.mathematics.regions import REALS
from services.reward.mathematics.units import is_unit_phrase

WORDS = re.compile(r"[A-Za-z][A-Za-z'() -]*[A-Za-z)]|\([A-Z]\)")
FILLING = re.compile(
    r"^(?:(?:therefore|thus|so|hence|then|well|and)[, ]+)*"
    r"(?:(?:it|this|that|he|she|they|there|these|the [a-z]+(?: of [a-z]+)?)\s+"
    r"(?:is|are|was|were|will be|would be|has|have)\s+|(?:it|they)\s+)?"
    r"(?:an?|the|on an?|on)?\s*",
    re.IGNORECASE,
)
CONCLUDES = re.compile(
    r"\b(?:is|are|was|were|be|so|therefore|thus|hence|describes?|represents?)\b[,:]?|=", re.IGNORECASE
)
REMARK = re.compile(r"\s+(?:with|because|since|as|for|when|by|and)\b|[,;(:]")
DOUBT = re.compile(r"\b(?:not|never|neither|nor|whether|unless|if|doubt|or|cannot|un[a-z]+)\b|n't\b", re.IGNORECASE)
YES_NO = {"yes": True, "true": True, "no": False, "false": False, "correct": True, "incorrect": False}
SAME = {
    "∅": "no solution",
    "empty set": "no solution",
    "the empty set": "no solution",
    "no solutions": "no solution",
    "no real solution": "no solution",
    "no real solutions": "no solution",
    "none": "no solution",
    "dne": "does not exist",
    "undefined": "does not exist",
    "not defined": "does not exist",
}


def is_wordy(text: str) -> bool:
    """Whether a normalised text consists of words that are no number, unit, variable or name of a set of numbers."""
    if not WORDS.fullmatch(text) or len(text) < 2 or text.lower() in REALS:
        return False
    longest = max((len(word) for word in re.findall(r"[A-Za-z]+", text)), default=0)
    return (longest > 1 or text.startswith("(")) and not is_unit_phrase(text) and read_number_words(text) is None


def words_agree(expected: str, found: str) -> bool:
    """Whether an answer says the expected words, and nothing else that could be an answer."""
    wanted, given = canonical(expected), canonical(found)
    if wanted == given:
        return True
    if wanted not in YES_NO and wanted in (conclusion(found), before_remark(given)):
        return True
    first = re.match(r"[a-z]+", given)
    if wanted in YES_NO and first and first[0] in YES_NO:
        rest = given[first.end() :].lstrip()
        return YES_NO[first[0]] == YES_NO[wanted] and not rest.startswith(("or ", "and ", "/"))
    return SAME.get(wanted, wanted) == SAME.get(given, given)


def before_remark(text: str) -> str:
    """What a canonical text says before it goes on, "geometric" of "geometric with ratio 3"; empty where it doubts."""
    return "" if DOUBT.search(text) else REMARK.split(text, maxsplit=1)[0].strip()


def conclusion(text: str) -> str:
    """What a sentence ends with after its last "is", "so" or equals sign; empty where it denies or doubts something."""
    if DOUBT.search(text):
        return ""
    *_, last = CONCLUDES.split(text)
    return canonical(last)


def canonical(text: str) -> str:
    """Lower case without markup, punctuation, and the words that lead up to an answer."""
    text = re.sub(r"[\s~]+", " ", text.replace("{", "").replace("}", "")).strip(" .,;:!*\"'()")
    return FILLING.sub("", text, count=1).lower().strip()
