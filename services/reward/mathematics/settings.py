"""Tells where, when, of what or with what something is from what it is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from services.reward.mathematics.expectations import ANYTHING, Expectation
from services.reward.mathematics.runs import Run

# As much of a sentence as is looked at before a stretch.
BEFORE_CHARACTERS = 80
DETERMINERS = (
    r"(?:\s+(?:the|an?|his|her|its|their|our|your|my|these|those|all|each|both|either|every|first|last|next|other"
    r"|initial|original"
    r"|given|remaining|whole|entire|total|same|only|exactly|about|approximately|[A-Z][a-z]+'s|[a-z]+'s))*"
)
# A stretch after such words says where, when, of what or with what something is, and not what it is.
SETTING = re.compile(
    r"\b(?:(?<!result )(?<!results )(?<!resulted )(?<!resulting )in|(?<!arrive )(?<!arrives )(?<!arrived )at"
    r"|(?<!enough )(?<!room )(?<!last )(?<!lasts )(?<!sufficient )(?<!sold )(?<!bought )for|between|among|from|than"
    r"|per|when|where|whenever|if|because|since|compared (?:to|with)"
    r"|(?<!factors )(?<!factor )(?<!factored )(?<!written )(?<!expressed )(?<!represented )(?<!given )(?<!known )as"
    r"|exceeds?|exceeding|above|below"
    r"|under|over|within|during|through|across|out of|divid(?:ed|es|ing) by|divisible by|multiplied by|multiples? of"
    r"|factors? of|divisors? of|(?:square |cube )?roots? of|one of|each of|all of|both of|half of|modulo|mod|on|using"
    r"|every|greater than|less than|provided(?: that)?"
    r"|(?<!left )(?<!up )(?<!her )(?<!him )(?<!them )(?<!us )(?<!me )(?<!ends )(?<!end )(?<!begins )(?<!starts )with"
    r"|(?:over|during|within|throughout|after|in) (?:the|that|this) (?:course|week|month|day|year|period|span|space) of"
    r"|with(?:\s+(?:an?|the))?\s+(?:side|sides|radius|radii|diameter|base|height|length|width|edges?|legs?"
    r"|slope)(?: lengths?)?"
    r"(?: of)?|split|shared|base|week|day|month|year|step|part|case|question|figure|chapter"
    r"|(?<=[a-z] )(?<!means )that (?:are|is|measures?|costs?)|(?:than|from) (?:the|its|an?) [a-z]+ of"
    r"|(?:of|in) (?:its|her|his|their|our|the (?:total|whole|original|initial|full)) [a-z]+ of"
    r"|who (?:is|was|are"
    r"|has"
    r"|had)|which (?:has|have|had)(?:\s+[a-z]+)?)" + DETERMINERS + r"\s+[(\[]?$",
    re.IGNORECASE,
)
# What comes after such words is what was before, or what follows from what is stated.
CLAUSE_AFTER = re.compile(
    r"\b(?:before|after|until|once|while|so that|of which|when|whereas)\s+(?:[A-Za-z'-]+\s+){1,8}$", re.IGNORECASE
)
INITIAL = re.compile(
    r"^\W*(?:(?:so|thus|hence|therefore|then),?\s+)?(?:after|before|with(?! (?:a )?probability)|without|given|despite"
    r"|from|starting)\b[^,0-9]*$",
    re.I,
)
AFTER_TIME = re.compile(r"\b(?:after|for|every|each)\s+(?:the\s+|about\s+)?$", re.IGNORECASE)
TIME = re.compile(r"\b(?:seconds?|minutes?|hours?|days?|weeks?|months?|years?)\b")
SIZE_OF = re.compile(
    r"(?<!has a )(?:\bof (?:size|length|width|height|radius|side|weight|value|diameter|edge|area|volume)s?"
    r"|\bmeasuring|\bweighing)\s+$"
)
WAYS = re.compile(r"\s*(?:different|distinct|possible|various|such)?\s*ways?\b")
# "2 of 5 books", "$2 back of her $50".
PART_OF = re.compile(r"\s*(?:back\s+)?(?:out\s+)?of" + DETERMINERS + r"\s+", re.IGNORECASE)
# "14 portions of 25 g", "12 weeks to save 180 dollars", "selling 40 bracelets"; "to get 9" tells what comes out.
PURPOSE = re.compile(
    r"\s*(?:(?:is|are) the\s+)?(?:(?!an?\b|the\b)[A-Za-z]+,?\s+){1,2}of\s+"
    r"|[^.;:]*?\b(?<!has )(?<!have )(?<!had )(?<!needs )(?<!need )to "
    r"(?!about|exactly|only|roughly|nearly|just|get|give|obtain|find|be\b|equal|make|have|leave|yield)"
    r"[a-z]+\s+(?:[a-z]+\s+){0,4}"
)
PARTICIPLE = re.compile(
    r"\s(?!leaving|giving|making|totall?ing|yielding|reaching|costing|getting|earning|bringing|having|remaining"
    r"|equall?ing"
    r"|becoming|being|amounting|obtaining|producing|using up|adding|including)[a-z]{3,}ing" + DETERMINERS + r"\s+$"
)
COPULA = re.compile(
    r"(?:(?<!to )\b(?:is|are|was|were|be|equals?|becomes?|measures?|gives?|yields?|gets?|obtain|leaves?|makes?|costs?"
    r"|contains?|comes to"
    r"|amounts? to|adds? up to|equal to)|=|:)\s+(?:exactly|about|only|just|thus|therefore|also|then|now|simply)?\s*$"
)


def drop_settings(sentence: str, runs: Sequence[Run], expectation: Expectation = ANYTHING) -> list[Run]:
    """The stretches that do not say where, what for or of what size something is."""
    stated: list[Run] = []
    for before, run in pairwise([None, *runs]):
        if run is None:
            continue
        start = sentence[max(0, run.start - BEFORE_CHARACTERS) : run.start]
        between = sentence[before.end : run.start] if before else None
        if SETTING.search(start) and not (start.endswith("in ") and WAYS.match(sentence, run.end)):
            continue
        if between is not None and PART_OF.fullmatch(between) and "=" not in run.text:
            continue
        if COPULA.search(start):
            stated.append(run)
            continue
        if between is not None and PURPOSE.fullmatch(between):
            continue
        if stated and between is not None and PARTICIPLE.search(between):
            continue
        if run.start > 0 and INITIAL.match(sentence[: run.start]):
            continue
        if expectation.asks_time is False and AFTER_TIME.search(start) and TIME.search(run.text):
            continue
        if stated and (CLAUSE_AFTER.search(start) or SIZE_OF.search(start) or is_dimension(sentence, before, run)):
            continue
        stated.append(run)
    return stated


def is_dimension(sentence: str, before: Run | None, run: Run) -> bool:
    """Whether a stretch is the second figure of a size, "tiles of size 20 cm by 30 cm"."""
    if before is None or sentence[before.end : run.start] != " by ":
        return False
    return SIZE_OF.search(sentence[max(0, before.start - BEFORE_CHARACTERS) : before.start]) is not None
