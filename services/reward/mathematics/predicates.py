"""Chooses among the stretches of mathematics in a sentence the one that the sentence states."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from services.reward.mathematics.assignments import HAS_VARIABLE
from services.reward.mathematics.expectations import ANYTHING, Expectation, Form
from services.reward.mathematics.formulas import SPAN, unwrap
from services.reward.mathematics.normalise import normalise
from services.reward.mathematics.numbers import read_number
from services.reward.mathematics.quantities import read_clock, read_quantity
from services.reward.mathematics.reading import read_shape
from services.reward.mathematics.runs import Run
from services.reward.mathematics.shapes import Assignment, Group, Matrix
from services.reward.mathematics.splitting import split_top

# As much of a sentence as is looked at before a stretch.
BEFORE_CHARACTERS = 80
MAX_CANDIDATE_CHARACTERS = 200
DETERMINERS = (
    r"(?:\s+(?:the|an?|his|her|its|their|our|your|my|these|those|all|each|both|either|every|first|last|next|other|initial|original"
    r"|given|remaining|whole|entire|total|same|only|exactly|about|approximately|[A-Z][a-z]+'s|[a-z]+'s))*"
)
# A stretch after such words says where, when, of what or with what something is, and not what it is.
SETTING = re.compile(
    r"\b(?:(?<!result )(?<!results )(?<!resulted )(?<!resulting )in|(?<!arrive )(?<!arrives )(?<!arrived )at|(?<!enough )(?<!room )(?<!last )(?<!lasts )(?<!sufficient )(?<!sold )(?<!bought )for|between|among|from|than|per|when|where|whenever|if|because|since|compared (?:to|with)|(?<!written )(?<!expressed )(?<!represented )(?<!given )(?<!known )as|exceeds?|exceeding|above|below"
    r"|under|over|within|during|through|across|out of|divid(?:ed|es|ing) by|divisible by|multiplied by|multiples? of"
    r"|factors? of|divisors? of|(?:square |cube )?roots? of|one of|each of|all of|both of|half of|modulo|mod|on|using"
    r"|every|greater than|less than|provided(?: that)?|(?<!left )(?<!up )(?<!her )(?<!him )(?<!them )(?<!us )(?<!me )(?<!ends )(?<!end )(?<!begins )(?<!starts )with"
    r"|(?:over|during|within|throughout|after|in) (?:the|that|this) (?:course|week|month|day|year|period|span|space) of"
    r"|with(?:\s+(?:an?|the))?\s+(?:side|sides|radius|radii|diameter|base|height|length|width|edges?|legs?|slope)(?: lengths?)?"
    r"(?: of)?|split|shared|base|week|day|month|year|step|part|case|question|figure|chapter|who (?:is|was|are|has|had)|which (?:has|have|had)(?:\s+[a-z]+)?)"
    + DETERMINERS
    + r"\s+[(\[]?$",
    re.IGNORECASE,
)
# What comes after such words is what was before, or what follows from what is stated.
CLAUSE_AFTER = re.compile(
    r"\b(?:before|after|until|once|while|so that|of which|when|whereas)\s+(?:[A-Za-z'-]+\s+){1,8}$", re.IGNORECASE
)
INITIAL = re.compile(
    r"^\W*(?:(?:so|thus|hence|therefore|then),?\s+)?(?:after|before|with(?! (?:a )?probability)|without|given|despite|from|starting)\b[^,0-9]*$", re.I
)
AFTER_TIME = re.compile(r"\b(?:after|for|every|each)\s+(?:the\s+|about\s+)?$", re.IGNORECASE)
TIME = re.compile(r"\b(?:seconds?|minutes?|hours?|days?|weeks?|months?|years?)\b")
SIZE_OF = re.compile(
    r"(?<!has a )(?:\bof (?:size|length|width|height|radius|side|weight|value|diameter|edge|area|volume)s?|\bmeasuring|\bweighing)\s+$"
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
    r"\s(?!leaving|giving|making|totall?ing|yielding|reaching|costing|getting|earning|bringing|having|remaining|equall?ing"
    r"|becoming|being|amounting|obtaining|producing|using up|adding|including)[a-z]{3,}ing" + DETERMINERS + r"\s+$"
)
COPULA = re.compile(
    r"(?:(?<!to )\b(?:is|are|was|were|be|equals?|becomes?|measures?|gives?|yields?|gets?|obtain|leaves?|makes?|costs?|contains?|comes to"
    r"|amounts? to|adds? up to|equal to)|=|:)\s+(?:exactly|about|only|just|thus|therefore|also|then|now|simply)?\s*$"
)
CONNECTIVES = (
    r"^\W*(?:(?:so|thus|hence|therefore|consequently|then|and|now|finally|in conclusion|as a result|we (?:see|conclude|find"
    r"|get|know)|this (?:means|shows|implies)|it follows|that|clearly|also|exactly|only|all|the (?:number|value|numbers"
    r"|values)),?\s+)*$"
)
COUNTS = re.compile(
    r"\b(?:is|are|was|were|be|takes?|took|has|have|had|needs?|leaves?|left|gets?|exactly|only|just|about|remains?|equals?)\s+$"
)
BEGAN = re.compile(r"\b(?:start|began|begin|left|leav|depart|from|since|open)[a-z]*(?: at)?\s+$", re.IGNORECASE)
OPENS = re.compile(CONNECTIVES, re.IGNORECASE)
IS_THE = re.compile(
    r"(?:\s+[a-z-]+){0,4}?\s+(?:is|are|was|were)\s+(?:indeed |therefore |thus |exactly |hence )?(?:the|an?|our|what|how|which)\b"
)
# "12 edges: 4 on top, 4 at the bottom and 4 at the sides".
BREAKDOWN = re.compile(r"(?:\s+[a-z-]+){0,3}:\s|(?<=:)\s")
MONEY = (("usd", 1),)
REGIONAL = re.compile(r"[<>≤≥≠∪∞ℝ]|\\(?:leq?|geq?|neq?|infty|cup|lt|gt)(?![A-Za-z])|[\[(][^()\[\]]*,[^()\[\]]*[)\]]")
TOTAL = re.compile(r"(?:\s+[a-z]+){0,6}\s*[,:;(—–-]+\s*(?:namely\s+)?")
PARTS = re.compile(r"(?:\s+[a-z]+){0,4}(?:,|,?\s+and)\s+")
CLAUSE = re.compile(r"[,;]\s+(?:and\s+)?(?:so(?! that)|thus|hence|therefore)\b")
# Between two answers of which neither is meant for sure.
HEDGE = re.compile(
    r"[\s,;—–-]*\(?(?:\b(?:or|and|but)\b|[—–])[\s,]*(?:(?:possibly|perhaps|maybe|probably|even|else|alternatively|also)\b[\s,]*"
    r"|(?:it |they |that |the [a-z]+ )?(?:might|may|could|can)(?: also| even| well)* be\s+)+(?:[a-z]+\s+){0,4}"
    r"|[\s,;—–-]*\(?\s*(?:or\s+)?(?:possibly|perhaps|maybe|alternatively)\s+(?:even\s+)?|\s*\(or\s+|\s*[—–-]\s*or\s+"
    r"|.{0,60}\bif\b[^.;]{0,80}\b(?:but|and|or|otherwise)\s+(?:it is |it's |it would be )?",
    re.IGNORECASE,
)
ABOUT = re.compile(
    r"[\s,;]*\(?(?:\b(?:or|i\.e\.|that is),?\s+)?\b(?:about|approximately|roughly|around)\s+", re.IGNORECASE
)


def choose_runs(sentence: str, runs: Sequence[Run], expectation: Expectation, *, first: bool) -> list[Run]:
    """The stretches that are the answer: one, or as many as the answer has values."""
    runs = [part for run in runs for part in split_amounts(sentence, run)]
    runs = join_doubtful(sentence, runs)
    candidates = [run for run in runs if run.has_sign] or list(runs)
    is_plain = any(run.has_sign for run in runs)
    counted = [run for run in runs if run.has_sign or not is_plain or is_counted(sentence, run)]
    stated = drop_settings(sentence, counted, expectation)
    if expectation.form is Form.TUPLE:
        pieces = [piece for run in candidates for piece in split_items(run, expectation.count)]
        found = [run for run in pieces if fits_tuple(run, expectation.count)]
        named = [run for run in candidates if is_named(run)]
        if found:
            stated = drop_settings(sentence, found) or found
        elif len(named) == expectation.count:
            return named
    if expectation.form is Form.LIST and expectation.count > 1:
        several = choose_several(stated or candidates, candidates, expectation.count)
        if several:
            return several
    if not stated:
        stated = [run for run in candidates if has_unit(run, expectation)] or candidates
    if expectation.unit is not None and not any(has_unit(run, expectation) for run in stated):
        stated = [run for run in candidates if has_unit(run, expectation)][-1:] or stated
    if expectation.is_number:
        stated = [piece for run in stated for piece in split_measures(sentence, run, expectation)]
        stated = [run for run in stated if may_be_number(run, expectation)] or stated
        stated = [piece for run in stated for piece in split_clauses(sentence, run)]
        if (total := find_total(sentence, stated)) is not None:
            return [total]
    if expectation.form is Form.CLOCK:
        pieces = [piece for run in candidates for piece in split_commas(run)]
        stated = [run for run in pieces if is_end(sentence, run)] or stated
    elif expectation.form is Form.REGION:
        regions = [run for run in candidates if REGIONAL.search(run.text)]
        stated = drop_settings(sentence, regions) or regions or stated
    elif expectation.form is Form.EQUATION:
        stated = [run for run in candidates if re.search(r"[A-Za-z].*=", run.text)] or stated
    if first and OPENS.match(sentence[: stated[0].start]):
        return [stated[0]]
    subject = find_subject(sentence, stated)
    if subject is not None:
        return [subject]
    return [prefer_formula(sentence, last_clause(sentence, stated))]


def split_amounts(sentence: str, run: Run) -> list[Run]:
    """Parts "1.5 m in 500 s"; "1 in 4" is a chance."""
    left, middle, right = run.text.partition(" in ")
    is_amount = re.search(r"[A-Za-z}$]$", left) or WAYS.match(sentence, run.end)
    if not middle or not is_amount or not re.search(r"[0-9]", left):
        return [run]
    cut = run.start + len(left)
    return [replace(run, text=left, end=cut), replace(run, text=right, start=run.end - len(right))]


def split_commas(run: Run) -> list[Run]:
    """Parts "10:20 PM, 2 hours and 35 minutes after"."""
    pieces, position = [], 0
    for text in run.text.split(", "):
        pieces.append(replace(run, text=text, start=run.start + position, end=run.start + position + len(text)))
        position += len(text) + 2
    return pieces


def split_items(run: Run, count: int) -> list[Run]:
    """Parts "(2, -3), 6 units below" into the items of a list, unless all of it is the tuple."""
    items = split_top(run.text) if not fits_tuple(run, count) else []
    return [replace(run, text=item) for item in items] if len(items) > 1 else [run]


def split_clauses(sentence: str, run: Run) -> list[Run]:
    """Parts "31, and 17" of "he eats 31, and 17 are left" where one number is asked for."""
    left, comma, right = run.text.partition(", and ")
    if not comma or not re.search(r"[A-Za-z]", sentence[run.end :]):
        return [run]
    return [replace(run, text=left, end=run.start + len(left)), replace(run, text=right, start=run.end - len(right))]


def split_measures(sentence: str, run: Run, expectation: Expectation) -> list[Run]:
    """Parts "10 years, 1 250 000" of "after 10 years, 1 250 000 people live there"."""
    pieces = split_commas(run)
    if len(pieces) < 2 or not all(re.search(r"[0-9]\s*[A-Za-z]", piece.text) for piece in pieces[:-1]):
        return [run]
    return drop_settings(sentence, pieces, expectation) or [run]


def may_be_number(run: Run, expectation: Expectation) -> bool:
    """Whether a stretch may be the number that is asked for.

    It has no variables, or says what they are; it is no interval, and no measure where things are counted.
    """
    quantity = read_quantity(normalise(unwrap(run.text[:MAX_CANDIDATE_CHARACTERS])))
    if quantity.body.startswith(("[", "(")) and "," in quantity.body:
        return False
    if expectation.asks_count and quantity.unit is not None and quantity.unit.dimension == MONEY:
        return False
    return "=" in quantity.body or not HAS_VARIABLE.search(quantity.body)


def find_total(sentence: str, stated: Sequence[Run]) -> Run | None:
    """The stretch whose parts those after it are: "35 students in all, 21 girls and 14 boys"."""
    for position in range(len(stated) - 2):
        gaps = [sentence[left.end : right.start] for left, right in pairwise(stated[position:])]
        if TOTAL.fullmatch(gaps[0]) and all(map(PARTS.fullmatch, gaps[1:])):
            numbers = [read_number(read_quantity(normalise(unwrap(run.text))).body) for run in stated[position:]]
            values = [number.value for number in numbers if number is not None]
            if len(values) == len(numbers) and values[0] == sum(values[1:]):
                return stated[position]
    return None


def has_unit(run: Run, expectation: Expectation) -> bool:
    """Whether a stretch has a unit of what is measured."""
    unit = read_quantity(normalise(unwrap(run.text[:MAX_CANDIDATE_CHARACTERS]))).unit
    return unit is not None and expectation.unit is not None and unit.dimension == expectation.unit.dimension


def join_doubtful(sentence: str, runs: Sequence[Run]) -> list[Run]:
    """The stretches, with those as one that a sentence offers as alternatives, or of which one rounds the other."""
    joined = [runs[0]]
    for run in runs[1:]:
        between = sentence[joined[-1].end : run.start]
        sign = " ≈ " if ABOUT.fullmatch(between) else ", " if HEDGE.fullmatch(between) else ""
        if sign:
            before = joined.pop()
            text = unwrap(before.text).rstrip(",;:.") + sign + unwrap(run.text)
            run = Run(text, before.start, run.end, before.has_sign or run.has_sign)
        joined.append(run)
    return joined


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


def choose_several(stated: Sequence[Run], candidates: Sequence[Run], count: int) -> list[Run] | None:
    """As many values as the answer has: in one stretch, or in as many; None where there are more or fewer."""
    for run in reversed(stated):
        items = items_of(run)
        if len(items) == count and not any("=" in item and not is_named(replace(run, text=item)) for item in items):
            return [run]
    pieces = [replace(run, text=item) for run in candidates for item in items_of(run)]
    for group in (stated, candidates, [piece for piece in pieces if is_named(piece)]):
        if sum(2 if "±" in run.text or "\\pm" in run.text else 1 for run in group) == count:
            return list(group)
    return None


def items_of(run: Run) -> tuple[str, ...]:
    """The values of a list or set; one of anything else."""
    shape = read_shape(normalise(unwrap(run.text[:MAX_CANDIDATE_CHARACTERS])))
    if isinstance(shape, Assignment):
        shape = read_shape(shape.value)
    return shape.items if isinstance(shape, Group) and shape.kind in ("list", "set") else (run.text,)


def is_counted(sentence: str, run: Run) -> bool:
    """Whether a number in words is what the sentence says of something: "it takes one hour", but not "the one who"."""
    return COUNTS.search(sentence[max(0, run.start - 30) : run.start]) is not None


def is_end(sentence: str, run: Run) -> bool:
    """Whether a stretch is a time of day, and not one when something began."""
    before = sentence[max(0, run.start - 30) : run.start]
    return read_clock(normalise(unwrap(run.text[:MAX_CANDIDATE_CHARACTERS]))) is not None and not BEGAN.search(before)


def is_named(run: Run) -> bool:
    """Whether a stretch gives a value under the name of a variable."""
    shape = read_shape(normalise(unwrap(run.text[:MAX_CANDIDATE_CHARACTERS])))
    return isinstance(shape, Assignment) and re.fullmatch(r"[A-Za-z](?:_[0-9])?", shape.name) is not None


def fits_tuple(run: Run, count: int) -> bool:
    """Whether a stretch is a tuple or vector of so many values, or that many values under names."""
    shape = read_shape(normalise(unwrap(run.text[:MAX_CANDIDATE_CHARACTERS])))
    if isinstance(shape, Assignment):
        shape = read_shape(shape.value)
    if isinstance(shape, Matrix):
        return True
    if not isinstance(shape, Group) or shape.kind == "set" or len(shape.items) != count:
        return False
    return shape.kind == "tuple" or not any(item.startswith(("(", "⟨")) for item in shape.items)


def find_subject(sentence: str, stated: Sequence[Run]) -> Run | None:
    """The first stretch where the sentence says of it what it is: "113 is the smallest prime"."""
    run = stated[0]
    is_said = OPENS.match(sentence[: run.start]) or COUNTS.search(sentence[max(0, run.start - 30) : run.start])
    if is_said and BREAKDOWN.match(sentence, run.end) and len(stated) > 1:
        return run
    if not OPENS.match(sentence[: run.start]) or not IS_THE.match(sentence, run.end):
        return None
    if CLAUSE.search(sentence, run.end):
        return None
    others = [other for other in stated[1:] if COPULA.search(sentence[max(0, other.start - 30) : other.start])]
    return None if others else run


def last_clause(sentence: str, stated: Sequence[Run]) -> Sequence[Run]:
    """The stretches after the last "so" where there are any."""
    starts = [match.end() for match in CLAUSE.finditer(sentence)]
    for start in reversed(starts):
        later = [run for run in stated if run.start >= start]
        if later:
            return later
    return stated


def prefer_formula(sentence: str, stated: Sequence[Run]) -> Run:
    """The last stretch; of formulas and plain numbers a formula, unless the number is said to be something."""
    formulas = [run for run in stated if SPAN.search(run.text)] if "$" in sentence else []
    if not formulas:
        return stated[-1]
    last = stated[-1]
    if last is not formulas[-1] and COPULA.search(sentence[max(0, last.start - 30) : last.start]):
        return last
    return formulas[-1]


def answers_of(answer: str, expectation: Expectation) -> bool:
    """Whether what a sentence was found to say has the form that is expected, or may have it."""
    if expectation.form is Form.TUPLE:
        return fits_tuple(Run(answer, 0, len(answer), True), expectation.count)
    if expectation.unit is not None and len(answer) <= MAX_CANDIDATE_CHARACTERS:
        unit = read_quantity(normalise(answer)).unit
        return unit is None or unit.dimension == expectation.unit.dimension
    return True
