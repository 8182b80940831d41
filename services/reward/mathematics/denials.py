"""What a sentence says that its answer is not, or may not be."""

from __future__ import annotations

import re
from collections.abc import Sequence

from services.reward.mathematics.formulas import unwrap
from services.reward.mathematics.runs import Run

BEFORE_CHARACTERS = 40
MAY_DENY = re.compile(r"\b(?:not|never|cannot)\b|n't\b", re.IGNORECASE)
DENIED = re.compile(
    r"\b(?:(?:is|are|was|be|equals?|gives?|gets?|have|has)\s+(?:definitely |certainly |simply |actually )?(?:not|never)"
    r"|(?:is|are|was|does|do|did|ca|wo|could)n't(?: be| equal| give| get)?|(?:cannot|can not|does not|do not|will not)"
    r" (?:be|equal|give|get))\s+(?:just |simply |actually |equal to )?\$?$",
    re.IGNORECASE,
)
# Between two answers of which neither is meant for sure.
HEDGE = re.compile(
    r"[\s,;—–-]*\(?(?:\b(?:or|and|but)\b|[—–])[\s,]*(?:(?:possibly|perhaps|maybe|probably|even|else|alternatively"
    r"|also)\b[\s,]*"
    r"|(?:it |they |that |the [a-z]+ )?(?:might|may|could|can)(?: also| even| well)* be\s+)+(?:[a-z]+\s+){0,4}"
    r"|[\s,;—–-]*\(?\s*(?:or\s+)?(?:possibly|perhaps|maybe|alternatively)\s+(?:even\s+)?|\s*\(or\s+|\s*[—–-]\s*or\s+"
    r"|[\s,;—–-]*\(?(?:unless|if not|or else|except if)\s+(?:(?:it|that|the [a-z]+)(?:'s| is| was| should be| turns out"
    r" to be| has to be)\s+)?(?:[a-z]+\s+){0,2}"
    r"|[\s,;—–-]*\(?(?:though|although|but|while)\s+(?:it|they|that|the [a-z]+)\s+(?:might|may|could|can)(?: also"
    r"| even| well)* be\s+(?:[a-z]+\s+){0,3}"
    r"|.{0,60}\bif\b[^.;]{0,80}\b(?:but|and|or|otherwise)\s+(?:it is |it's |it would be )?",
    re.IGNORECASE,
)
BESIDE = re.compile(r"[\s,;—–-]*\(?\b(?:but|and|or|though|although)\b\s+(?:also\s+)?", re.IGNORECASE)
# "but 6 is possible as well".
POSSIBLE = re.compile(
    r"\s+(?:(?:is|would be|seems|might be|may be|could be|are)\s+(?:also\s+|equally\s+|just as\s+|not\s+)*(?:possible"
    r"|plausible|conceivable|likely|an option|excluded|ruled out|right|correct)|(?:cannot|can't|can not) be (?:excluded"
    r"|ruled out)|(?:might|may|could) (?:also |well )*be\b)",
    re.IGNORECASE,
)


def drop_denied(sentence: str, runs: Sequence[Run]) -> list[Run]:
    """The stretches without what the sentence says that something is not, wherever it stands."""
    if not MAY_DENY.search(sentence):
        return list(runs)
    denied = {bare(run) for run in runs if DENIED.search(sentence[max(0, run.start - BEFORE_CHARACTERS) : run.start])}
    return [run for run in runs if bare(run) not in denied]


def bare(run: Run) -> str:
    """The stretch without markup and punctuation."""
    return unwrap(run.text).strip(" *_,;:.")


def is_hedge(sentence: str, left: Run, right: Run) -> bool:
    """Whether a sentence offers two stretches as alternatives."""
    between = sentence[left.end : right.start]
    if HEDGE.fullmatch(between):
        return True
    return BESIDE.fullmatch(between) is not None and POSSIBLE.match(sentence, right.end) is not None
