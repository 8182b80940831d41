"""Answers that are words: yes, Thursday, no solution."""

from __future__ import annotations

import re

from services.reward.math.numbers import read_number_words
from services.reward.math.parse import REALS
from services.reward.math.units import is_unit_phrase

WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{4,}(?![A-Za-z])")
ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[a-z]+\}")
PHRASE = re.compile(r"[A-Za-z][A-Za-z'() -]*[A-Za-z)]|\([A-Z]\)")
# Words that lead up to an answer: "Therefore, it is a".
LEAD = re.compile(
    r"^(?:(?:therefore|thus|so|hence|then|well|and)[, ]+)*"
    r"(?:(?:it|this|that|he|she|they|there|these|the [a-z]+(?: of [a-z]+)?)\s+"
    r"(?:is|are|was|were|will be|would be|has|have)\s+|(?:it|they)\s+)?(?:(?:an?|the|on an?|on)\b)?\s*",
    re.IGNORECASE,
)
CONCLUDES = re.compile(r"\b(?:is|are|was|were|be|so|therefore|thus|hence|describes|represents|becomes)\b[,:]?|=|:\s")
DOUBT = re.compile(r"\b(?:not|never|neither|nor|whether|unless|if|doubt|or|maybe|perhaps|cannot|un[a-z]+)\b|n't\b")
YES_NO = {"yes": True, "true": True, "no": False, "false": False, "correct": True, "incorrect": False}
NO_SOLUTION, NO_EXISTENCE = "no solution", "does not exist"
SAME = {
    **dict.fromkeys(("∅", "empty set", "the empty set", "no solutions", "no real solution"), NO_SOLUTION),
    **dict.fromkeys(("no real solutions", "none"), NO_SOLUTION),
    **dict.fromkeys(("dne", "undefined", "not defined"), NO_EXISTENCE),
}
NO_SOLUTIONS = re.compile(
    r"\bno\s+(?:[a-z-]+\s+){0,3}?(?:solutions?|roots?|numbers?|values?|points?|integers?|pairs?|zeros?|intersections?"
    r"|x)\b|\bempty\b|(?:^|[= ])∅$|\binconsistent\b|\b(?:doesn't|does not|don't|do not) have (?:any |a )?(?:real )?"
    r"(?:solution|root)s?"
)
NOT_EXISTING = re.compile(r"\b(?:does|do)(?:n't| not) exist\b|\bundefined\b|\b(?:isn't|is not|not) defined\b|\bdne\b")
EXCEPTION = re.compile(
    r"\bno (?:other|more|further|additional)\b|\b(?:other than|except|besides|apart from|but|unless|only if)\b"
)


def has_words(text: str) -> bool:
    """Returns whether a text holds prose, which no algebra reads."""
    return WORD.search(ENVIRONMENT.sub("", text)) is not None


def is_wordy(text: str) -> bool:
    """Returns whether a normalised text is words, and no number, unit, variable or name of a set of numbers."""
    if not PHRASE.fullmatch(text) or len(text) < 2 or REALS.fullmatch(text):
        return False
    longest = max((len(word) for word in re.findall(r"[A-Za-z]+", text)), default=0)
    return (longest > 1 or text.startswith("(")) and not is_unit_phrase(text) and read_number_words(text) is None


def is_empty_set(text: str) -> bool:
    """Returns whether a normalised text is the empty set as a sign."""
    return re.fullmatch(r"∅|[⦃{]\s*[⦄}]", text) is not None


def words_agree(expected: str, found: str) -> bool:
    """Returns whether an answer says the expected words, in singular or plural, and nothing that may be another answer.

    The words may stand alone or conclude a sentence that neither denies nor doubts, "so it is on Thursday".
    """
    wanted, given = canonical(expected), canonical(found)
    if wanted == given:
        return True
    meaning = SAME.get(wanted, wanted)
    if meaning in (NO_SOLUTION, NO_EXISTENCE):
        pattern = NO_SOLUTIONS if meaning == NO_SOLUTION else NOT_EXISTING
        is_said = SAME.get(given) == meaning or pattern.search(given) is not None
        return is_said and not EXCEPTION.search(given)
    if wanted in YES_NO:
        said = re.match(r"[a-z]+", given)
        return said is not None and YES_NO.get(said[0]) is YES_NO[wanted] and not leaves_open(given[said.end() :])
    if DOUBT.search(given):
        return False
    conclusion = canonical(CONCLUDES.split(given)[-1])
    return wanted in (conclusion, conclusion.removesuffix("s")) or wanted.removesuffix("s") == given.removesuffix("s")


def leaves_open(rest: str) -> bool:
    """Returns whether what follows a yes or no takes it back, "yes and no", "yes, or maybe no"."""
    return re.match(r"\W*(?:or|and|but|maybe|perhaps)\b|/|.*\b(?:yes|no|true|false)\b", rest) is not None


def canonical(text: str) -> str:
    """Returns lower case without markup, punctuation, and words that lead up to an answer."""
    text = re.sub(r"⦃\s*⦄|\{\s*\}", "∅", text)
    text = re.sub(r"[\s~]+", " ", text.replace("{", "").replace("}", "")).strip(" .,;:!*\"'()")
    return LEAD.sub("", text, count=1).lower().strip()
