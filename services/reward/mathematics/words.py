"""Answers that are words: yes, Thursday, no solution."""

from __future__ import annotations

import re

from services.reward.mathematics.number_words import read_number_words
from services.reward.mathematics.regions import REALS
from services.reward.mathematics.units import is_unit_phrase

WORDS = re.compile(r"[A-Za-z][A-Za-z'() -]*[A-Za-z)]|\([A-Z]\)")
DATE = re.compile(
    r"(?:January|February|March|April|May|June|July|August|September|October|November|December) [0-9]{1,2}(?:st|nd|rd"
    r"|th)?(?:, [0-9]{4})?"
)
CONNECTIVES = (
    r"(?:(?:therefore|thus|so|hence|then|well|and|consequently|in conclusion|we (?:conclude|see|find) that)[, ]+)*"
)
FILLING = re.compile(
    rf"^{CONNECTIVES}"
    r"(?:(?:it|this|that|he|she|they|there|these|the [a-z]+(?: of [a-z]+)?)\s+"
    r"(?:is|are|was|were|will be|would be|has|have)\s+|(?:it|they)\s+)?"
    r"(?:(?:an?|the|on an?|on)\b)?\s*",
    re.IGNORECASE,
)
CONCLUDES = re.compile(
    r"\b(?:it|that|this|he|she)'s\b|\b(?:is|are|was|were|be|so|therefore|thus|hence|describes?|represents?|becomes?"
    r"|called)\b[,:]?|=|:\s",
    re.IGNORECASE,
)
# Who answers what to choose.
CHOOSES = re.compile(
    r"\b(?:choose|chooses|pick|picks|select|take|takes|prefer|recommend|buy|use|go with|opt for|get|gets)\s+"
)
REMARK = re.compile(
    r"\s+(?:with|because|since|as|for|when|by|and|in|on|at|after|that|which|who|from|of|than|to|exactly)\b|[,;(:]"
)
ADJUNCT = re.compile(r"\s+(?:with|because|since|where|when)\b")
DOUBT = re.compile(r"\b(?:not|never|neither|nor|whether|unless|if|doubt|or|cannot|un[a-z]+)\b|n't\b", re.IGNORECASE)
YES_NO = {"yes": True, "true": True, "no": False, "false": False, "correct": True, "incorrect": False}
NO_SOLUTION, NO_EXISTENCE = "no solution", "does not exist"
SAME = {
    "∅": NO_SOLUTION,
    "empty set": NO_SOLUTION,
    "the empty set": NO_SOLUTION,
    "no solutions": NO_SOLUTION,
    "no real solution": NO_SOLUTION,
    "no real solutions": NO_SOLUTION,
    "none": NO_SOLUTION,
    "dne": NO_EXISTENCE,
    "undefined": NO_EXISTENCE,
    "not defined": NO_EXISTENCE,
}
NO_SOLUTIONS = re.compile(
    r"\bno\s+(?:[a-z-]+\s+){0,3}?(?:solutions?|roots?|numbers?|values?|points?|integers?|pairs?|zeros?|intersections?"
    r"|x)\b|\bhas none\b|\bempty\b|(?:^|[= ])∅$|\binconsistent\b|\b(?:doesn't|does not|don't|do not) have (?:any "
    r"|a )?(?:real )?(?:solution|root)s?"
    r"|\b(?:can't|cannot) be (?:solved|satisfied)\b|\bnot solvable\b|\bunsolvable\b|\bnever (?:true|satisfied|zero"
    r"|holds)\b"
)
NOT_EXISTING = re.compile(
    r"\b(?:does|do)(?:n't| not) exist\b|\bundefined\b|\b(?:isn't|is not|not) defined\b|\bno limit\b|\bdne\b"
)
EXCEPTION = re.compile(
    r"\bno (?:other|more|further|additional)\b|\b(?:other than|except|besides|apart from|but|unless|only if)\b"
)
SIMILAR = (("convergent", "converges"), ("divergent", "diverges"))
NOUNS = ("function", "triangle", "number", "series", "sequence", "matrix", "angle", "set", "curve", "graph")
# What may stand between a sentence's verb and a word that is its answer.
LEADS = re.compile(
    r"\s((?:(?:on|in|at|an?|the|comes|strictly|monotonically|always|most|likely|definitely|clearly|namely"
    r"|called)\s+)+)$"
)
# "The cheapest ones are sold by".
AGENT = re.compile(
    r"(?:^|\b(?:is|are|was|were|be|been)\s+)(?:[a-z]+ly\s+)?(?!followed|preceded|beaten|surpassed"
    r"|exceeded|succeeded|outdone|undercut)(?:won|run|led|read|cut|set|put|[a-z]+(?:ed|en|ld|ght|wn|un|nk|ade|one|id|ept|ent))"
    r"(?:\s+[a-z]+){0,2}\s+by\s+(?:the\s+)?$"
)
AMONG = re.compile(r"^(?:among|of|out of|between|in) [^,]*,\s+")
SUBJECT_VERB = re.compile(r"\s+(?:is|was|wins|won|has|had|comes|came|finishes|finished|gets|costs)\b")
CONTRAST = re.compile(r"\b(?:but|while|whereas|although|though)\b")
BESIDE = re.compile(r"\b(?:than|before|after|of|to|from|by|with|and|behind|like)\s+(?:the\s+|an?\s+)?$")


def is_wordy(text: str) -> bool:
    """Whether a normalised text consists of words that are no number, unit, variable or name of a set of numbers."""
    if DATE.fullmatch(text):
        return True
    if not WORDS.fullmatch(text) or len(text) < 2 or REALS.fullmatch(text):
        return False
    longest = max((len(word) for word in re.findall(r"[A-Za-z]+", text)), default=0)
    return (longest > 1 or text.startswith("(")) and not is_unit_phrase(text) and read_number_words(text) is None


def is_empty_set(text: str) -> bool:
    """Whether a normalised text is the empty set as a sign."""
    return re.fullmatch(r"∅|[⦃{]\s*[⦄}]", text) is not None


def words_agree(expected: str, found: str) -> bool:
    """Whether an answer says the expected words in any person or number, and nothing else that may be an answer."""
    return any(says(form, found) for form in inflect(expected))


def inflect(word: str) -> tuple[str, ...]:
    """A word with and without the s of the third person or the plural; names and phrases as they are."""
    if not re.fullmatch(r"[a-z]{4,}", word) or word.endswith("ss"):
        return (word,)
    return word, word.removesuffix("s") if word.endswith("s") else word + "s"


def says(expected: str, found: str) -> bool:
    """Whether an answer says exactly these words."""
    wanted, given = canonical(expected), canonical(found)
    if wanted == given:
        return True
    if SAME.get(wanted, wanted) == NO_SOLUTION:
        return given == "none" or (NO_SOLUTIONS.search(given) is not None and not EXCEPTION.search(given))
    if SAME.get(wanted, wanted) == NO_EXISTENCE:
        return NOT_EXISTING.search(given) is not None and not EXCEPTION.search(given)
    if wanted == "neither":
        return re.search(r"\bneither\b", given) is not None
    first = re.match(r"[a-z]+", given)
    if wanted in YES_NO:
        rest = given[first.end() :].lstrip() if first else ""
        is_said = first is not None and first[0] in YES_NO and YES_NO[first[0]] == YES_NO[wanted]
        return is_said and not rest.startswith(("or ", "and ", "/"))
    if wanted in (conclusion(found), before_remark(given)):
        return True
    return not DOUBT.search(given) and (is_predicate(wanted, given) or is_subject(wanted, given))


def is_predicate(wanted: str, given: str) -> bool:
    """Whether a sentence says that something is what is wanted, does it, or is to be chosen."""
    told = ADJUNCT.split(given, maxsplit=1)[0] if CONCLUDES.search(ADJUNCT.split(given, maxsplit=1)[0]) else given
    for said in (CONCLUDES.split(told)[-1], *CHOOSES.split(told)[1:][-1:]):
        phrase = REMARK.split(canonical(said), maxsplit=1)[0].strip()
        after = phrase.removeprefix(wanted).split() if phrase.startswith(f"{wanted} ") else None
        if phrase == wanted or (after is not None and len(after) <= 2 and all(word.isalpha() for word in after)):
            return True
        if phrase and wanted.removeprefix(phrase).strip() in NOUNS:
            return True
    place = re.search(rf"\b{re.escape(wanted)}(?=$|[,;]|\s+(?:that|this|which|in|at|when|for|by|to|because)\b)", told)
    if place and (lead := LEADS.search(told[: place.start()])) and not BESIDE.search(told[: lead.start(1)]):
        return True
    agent = re.search(rf"\b{re.escape(wanted)}(?=$|[,;]|\s+(?:for|at|in|on|with|because)\b)", told)
    if agent and AGENT.search(told[: agent.start()]):
        return True
    is_verb = re.fullmatch(r"[a-z]{3,}s(?: [a-z]+ly)?", wanted) is not None
    place = (
        re.search(rf"\b{re.escape(wanted)}(?=$|[,;]|\s+(?:by|because|to|since|for|when|as|at)\b)", given)
        if is_verb
        else None
    )
    return place is not None and place.start() > 0 and not BESIDE.search(given[: place.start()])


def is_subject(wanted: str, given: str) -> bool:
    """Whether a sentence begins with what is wanted, and says of it what it is or does."""
    given = AMONG.sub("", given)
    verb = SUBJECT_VERB.match(given.removeprefix(wanted)) if given.startswith(wanted) else None
    return verb is not None and not CONTRAST.search(given) and not re.search(r"\b(?:before|after|behind)\b", given)


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
    text = re.sub(r"⦃\s*⦄|\{\s*\}", "∅", text)
    text = re.sub(r"[\s~]+", " ", text.replace("{", "").replace("}", "")).strip(" .,;:!*\"'()")
    text = FILLING.sub("", text, count=1).lower().strip()
    for word, same in SIMILAR:
        text = text.replace(word, same)
    return text
