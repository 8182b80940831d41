"""Chooses among the stretches of mathematics in a sentence the one that the sentence states."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from services.reward.mathematics.candidates import (
    fits_tuple,
    has_unit,
    is_end,
    is_named,
    items_of,
    may_be_number,
    split_amounts,
    split_clauses,
    split_clocks,
    split_commas,
    split_items,
)
from services.reward.mathematics.conditions import choose_regions
from services.reward.mathematics.denials import drop_denied, is_hedge
from services.reward.mathematics.expectations import Expectation, Form
from services.reward.mathematics.formulas import SPAN, unwrap
from services.reward.mathematics.normalise import normalise
from services.reward.mathematics.numbers import read_number
from services.reward.mathematics.quantities import read_quantity
from services.reward.mathematics.runs import Run
from services.reward.mathematics.settings import COPULA, drop_settings

MAX_RUNS = 40
CONNECTIVES = (
    r"^\W*(?:(?:so|thus|hence|therefore|consequently|then|and|now|finally|in conclusion|as a result|we (?:see"
    r"|conclude|find"
    r"|get|know)|this (?:means|shows|implies)|it follows|that|clearly|also|exactly|only|all|the (?:number|value|numbers"
    r"|values)),?\s+)*$"
)
COUNTS = re.compile(
    r"\b(?:is|are|was|were|be|takes?|took|has|have|had|needs?|leaves?|left|gets?|exactly|only|just|about|remains?"
    r"|equals?)\s+$"
)
OPENS = re.compile(CONNECTIVES, re.IGNORECASE)
IS_THE = re.compile(
    r"(?:\s+[a-z-]+){0,4}?\s+(?:is|are|was|were)\s+(?:indeed |therefore |thus |exactly |hence )?(?:the|an?|our|what"
    r"|how|which)\b"
)
# "12 edges: 4 on top, 4 at the bottom and 4 at the sides".
BREAKDOWN = re.compile(r"(?:\s+[a-z-]+){0,3}:\s|(?<=:)\s")
TOTAL = re.compile(r"(?:\s+[a-z]+){0,6}\s*[,:;(—–-]+\s*(?:namely\s+)?")
PARTS = re.compile(r"(?:\s+[a-z]+){0,4}(?:,|,?\s+and)\s+")
PERCENT = re.compile(r"%|\bper ?cent")
OPENS_CLAUSE = re.compile(
    r"[,;]\s+(?:and\s+)?(?:so(?! that)|thus|hence|therefore),?\s+(?:(?:only|exactly|just|about|a)\s+)?"
)
ONE_OF = re.compile(r"[a-z]+", re.IGNORECASE)
CLAUSE = re.compile(r"[,;]\s+(?:and\s+)?(?:so(?! that)|thus|hence|therefore)\b")
ABOUT = re.compile(
    r"[\s,;]*\(?(?:\b(?:or|i\.e\.|that is),?\s+)?\b(?:about|approximately|roughly|around)\s+", re.IGNORECASE
)


def choose_runs(sentence: str, runs: Sequence[Run], expectation: Expectation, *, first: bool) -> list[Run]:
    """The stretches that are the answer: one, or as many as the answer has values; none where all are denied."""
    if expectation.form not in (Form.ANY, Form.REGION, Form.EQUATION):
        kept = drop_denied(sentence, runs)
        runs = kept if len(kept) == len(runs) else [run for run in kept if run.has_sign or is_counted(sentence, run)]
        if not runs:
            return []
    if len(runs) == 1 and not re.search(r"[\s,]", runs[0].text):
        return [runs[0]]
    runs = runs[:MAX_RUNS] if first else runs[-MAX_RUNS:]
    runs = [part for run in runs for part in split_amounts(sentence, run)]
    runs = join_doubtful(sentence, runs)
    candidates = [run for run in runs if run.has_sign] or list(runs)
    is_plain = any(run.has_sign for run in runs)
    counted = [run for run in runs if run.has_sign or not is_plain or is_counted(sentence, run)]
    if expectation.rank and (ranked := [run for run in counted if follows(sentence, run, expectation.rank)]):
        return ranked[-1:]
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
    if expectation.asks_percent:
        stated = [run for run in stated if PERCENT.search(run.text)] or stated
    if expectation.is_number:
        stated = [piece for run in stated for piece in split_measures(sentence, run, expectation)]
        stated = [run for run in stated if may_be_number(run, expectation)] or stated
        stated = [piece for run in stated for piece in split_clauses(sentence, run)]
        if (total := find_total(sentence, stated)) is not None:
            return [total]
    if expectation.form is Form.CLOCK:
        pieces = [piece for run in candidates for piece in split_clocks(run)]
        stated = [run for run in pieces if is_end(sentence, run)] or stated
    elif expectation.form is Form.REGION:
        stated = (
            choose_regions(sentence, last_clause(sentence, candidates))
            or choose_regions(sentence, candidates)
            or stated
        )
    elif expectation.form is Form.EQUATION:
        stated = [run for run in candidates if re.search(r"[A-Za-z].*=", run.text)] or stated
    if first and OPENS.match(sentence[: stated[0].start]):
        return [stated[0]]
    subject = find_subject(sentence, stated)
    if subject is not None:
        return [subject]
    return [prefer_formula(sentence, last_clause(sentence, stated))]


def follows(sentence: str, run: Run, noun: str) -> bool:
    """Whether a stretch stands directly after a noun, "day 12"."""
    return sentence[: run.start].lower().endswith(f"{noun} ")


def split_measures(sentence: str, run: Run, expectation: Expectation) -> list[Run]:
    """Parts "10 years, 1 250 000" of "after 10 years, 1 250 000 people live there"."""
    pieces = split_commas(run)
    if len(pieces) < 2 or not all(re.search(r"[0-9]\s*[A-Za-z]", piece.text) for piece in pieces[:-1]):
        return [run]
    return drop_settings(sentence, pieces, expectation) or [run]


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


def join_doubtful(sentence: str, runs: Sequence[Run]) -> list[Run]:
    """The stretches, with those as one that a sentence offers as alternatives, or of which one rounds the other."""
    joined = [runs[0]]
    for run in runs[1:]:
        between = sentence[joined[-1].end : run.start]
        sign = " ≈ " if ABOUT.fullmatch(between) else ", " if is_hedge(sentence, joined[-1], run) else ""
        if sign:
            before = joined.pop()
            text = unwrap(before.text).rstrip(",;:.") + sign + unwrap(run.text)
            run = Run(text, before.start, run.end, before.has_sign or run.has_sign)
        joined.append(run)
    return joined


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


def is_counted(sentence: str, run: Run) -> bool:
    """Whether a number in words is what the sentence says of something: "it takes one hour", but not "the one who".

    "so a quarter of the route is left" says so, too, and "so one of them is" does not.
    """
    if any(clause.end() == run.start for clause in OPENS_CLAUSE.finditer(sentence)) and not ONE_OF.fullmatch(run.text):
        return True
    return COUNTS.search(sentence[max(0, run.start - 30) : run.start]) is not None


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
