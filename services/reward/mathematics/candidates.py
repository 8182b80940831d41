"""What a stretch of mathematics in a sentence may be, and where it is really several."""

from __future__ import annotations

import re
from dataclasses import replace

from services.reward.mathematics.assignments import HAS_VARIABLE
from services.reward.mathematics.expectations import Expectation, Form
from services.reward.mathematics.formulas import unwrap
from services.reward.mathematics.normalise import normalise
from services.reward.mathematics.quantities import read_clock, read_quantity
from services.reward.mathematics.reading import read_shape
from services.reward.mathematics.runs import Run
from services.reward.mathematics.settings import WAYS
from services.reward.mathematics.shapes import Assignment, Group, Matrix
from services.reward.mathematics.splitting import split_top

MAX_CANDIDATE_CHARACTERS = 200
MONEY = (("usd", 1),)
BEGAN = re.compile(
    r"\b(?:start|began|begin|left|leav|depart|from|since|open|add)[a-z]*"
    r"(?: (?:this|that|it|them))?(?: at| to)?\s+$",
    re.IGNORECASE,
)


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


def split_clocks(run: Run) -> list[Run]:
    """Parts "10:20 PM, 2 hours after"; "14:55 (2:55 pm)" stays whole, with a comma, because both are said to be it."""
    pieces = split_commas(run)
    if "(" not in run.text:
        return pieces
    texts = [text.strip(" *)") for text in run.text.split("(")]
    clocks = [text for text in texts if read_clock(normalise(unwrap(text))) is not None]
    return [replace(run, text=", ".join(clocks))] if clocks else pieces


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


def may_be_number(run: Run, expectation: Expectation) -> bool:
    """Whether a stretch may be the number that is asked for.

    It has no variables, or says what they are; it is no interval, and no measure where things are counted.
    """
    quantity = read_quantity(normalise(unwrap(run.text[:MAX_CANDIDATE_CHARACTERS])))
    if quantity.body.startswith(("[", "(")) and "," in quantity.body:
        return False
    if expectation.asks_count and quantity.unit is not None and quantity.unit.dimension == MONEY:
        return False
    if len(items_of(run)) > 2:
        return False
    return "=" in quantity.body or not HAS_VARIABLE.search(quantity.body)


def has_unit(run: Run, expectation: Expectation) -> bool:
    """Whether a stretch has a unit of what is measured."""
    unit = read_quantity(normalise(unwrap(run.text[:MAX_CANDIDATE_CHARACTERS]))).unit
    return unit is not None and expectation.unit is not None and unit.dimension == expectation.unit.dimension


def items_of(run: Run) -> tuple[str, ...]:
    """The values of a list or set; one of anything else."""
    shape = read_shape(normalise(unwrap(run.text[:MAX_CANDIDATE_CHARACTERS])))
    if isinstance(shape, Assignment):
        shape = read_shape(shape.value)
    return shape.items if isinstance(shape, Group) and shape.kind in ("list", "set") else (run.text,)


def is_end(sentence: str, run: Run) -> bool:
    """Whether a stretch is a time of day, and not one when something began."""
    before = sentence[max(0, run.start - 30) : run.start]
    texts = normalise(unwrap(run.text[:MAX_CANDIDATE_CHARACTERS])).split(", ")
    return all(read_clock(text) is not None for text in texts) and not BEGAN.search(before)


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


def answers_of(answer: str, expectation: Expectation) -> bool:
    """Whether what a sentence was found to say has the form that is expected, or may have it."""
    if expectation.form is Form.TUPLE:
        return fits_tuple(Run(answer, 0, len(answer), True), expectation.count)
    if expectation.unit is not None and len(answer) <= MAX_CANDIDATE_CHARACTERS:
        unit = read_quantity(normalise(answer)).unit
        return unit is None or unit.dimension == expectation.unit.dimension
    return True
