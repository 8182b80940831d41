"""What a question tells of the answer that it asks for."""

from __future__ import annotations

import re
from dataclasses import replace

from services.reward.mathematics.expectations import Expectation, Form
from services.reward.mathematics.units import Unit, read_unit

QUESTION_CHARACTERS = 500
HOW_MANY = re.compile(r"\bhow many\s+(?:more |of |the |different |such |whole )*([a-z]+)", re.IGNORECASE)
HOW_LONG = re.compile(
    r"\bhow (?:long|old)\b|\bwhen\b|\b(?:what|at which) (?:time|age)\b|\bhow much time\b",
    re.IGNORECASE,
)
# "What is the fare in dollars?"
IN_UNIT = re.compile(r"\b(?:how (?:long|far|much|heavy|tall|wide|old)|what|find)\b[^.?!]*?\bin ([a-z]{3,})\b", re.I)
PERCENT = re.compile(r"\bwhat percent|\bpercentage\b|\bhow many percent", re.IGNORECASE)
# "On which day": the eleventh day is 11.
RANK = re.compile(
    r"\b(?:which|what)\s+(day|week|month|year|hour|minute|term|row|column|page|floor|step|round|throw|trial|try|attempt"
    r"|trip|game|position|place|bounce|move|pass|lap|jump|line|question|student|person|stop|birthday)\b",
    re.IGNORECASE,
)
INTERVAL = re.compile(
    r"\b(?:inequalit|intervals?\b|domain|range\b|solution set|set of (?:all )?(?:real|values|numbers|\$?[a-z]\b)"
    r"|(?:for|at) (?:which|what)\b|increasing|decreasing|concave|converge|defined\b|satisf(?:y|ies)\b)"
    r"|[<>≤≥]|\\(?:leq?|geq?|lt|gt)(?![A-Za-z])",
    re.IGNORECASE,
)
POINT = re.compile(
    r"\b(?:points?|ordered|pairs?|coordinates|vectors?|vertex|cent(?:er|re)|intersect\w*|midpoint|system|focus|foci"
    r"|minimum|maximum)\b|\(\s*[a-z]\s*,\s*[a-z]\s*\)",
    re.IGNORECASE,
)
SUBJECT = re.compile(r"\b[Ww](?:hat|hich)\s+(?:[a-z]+\s+){0,4}?(?:is|was)\s+([A-Z][a-z]+)\b|\bIs\s+([A-Z][a-z]+)\b")


def with_question(expectation: Expectation, question: str) -> Expectation:
    """The expectation with what the question tells of it."""
    if not question:
        return expectation
    question = question[-QUESTION_CHARACTERS:]
    if expectation.may_be_interval and INTERVAL.search(question) and not POINT.search(question):
        return Expectation(Form.REGION)
    if expectation.form is Form.WORDS:
        subjects = [match[1] or match[2] for match in SUBJECT.finditer(question)]
        return replace(expectation, subject=subjects[-1]) if subjects else expectation
    if not expectation.is_number:
        return expectation
    asked = HOW_MANY.findall(question)
    unit = read_unit(asked[-1]) if asked else None
    is_time = unit is not None and any(base in ("time", "month") for base, _ in unit.dimension)
    asks_time = is_time or (not asked and HOW_LONG.search(question) is not None)
    ranks = RANK.findall(question)
    return replace(
        expectation,
        asks_count=bool(asked) and unit is None,
        asks_time=asks_time,
        asks_percent=PERCENT.search(question) is not None,
        asked_unit=find_asked_unit(question) if expectation.unit is None else None,
        rank=ranks[-1].lower() if ranks else "",
    )


def find_asked_unit(question: str) -> tuple[str, Unit] | None:
    """The unit that the answer is asked for in, with its name; None where the question names none or several."""
    names = [name.lower() for name in [*HOW_MANY.findall(question), *IN_UNIT.findall(question)]]
    units = {name: unit for name in names if (unit := read_unit(name)) is not None}
    return next(iter(units.items())) if len(units) == 1 else None
