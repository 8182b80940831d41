"""What form of answer a reference asks for: its shape and unit, and never its value."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from services.reward.mathematics.assignments import HAS_VARIABLE
from services.reward.mathematics.labels import read_division, read_labels
from services.reward.mathematics.normalise import normalise
from services.reward.mathematics.numbers import read_number
from services.reward.mathematics.quantities import read_clock, read_quantity
from services.reward.mathematics.reading import read_shape
from services.reward.mathematics.regions import may_be_intervals
from services.reward.mathematics.scalars import RATIO
from services.reward.mathematics.shapes import Assignment, Group, Matrix, Region, Relation, Scalar
from services.reward.mathematics.units import Unit
from services.reward.mathematics.words import YES_NO, is_empty_set, is_wordy

MAX_CHARACTERS = 400


class Form(Enum):
    """What an answer looks like."""

    ANY = 0
    SCALAR = 1
    LIST = 2
    TUPLE = 3
    REGION = 4
    WORDS = 5
    RATIO = 6
    CLOCK = 7
    EQUATION = 8
    YES_NO = 9


@dataclass(frozen=True)
class Expectation:
    """The form of an answer, how many values it has, what they are called, and of one value the unit.

    `is_number` says that one number without variables is asked for; `asks_count` that a question asks how many things
    there are, and `asks_time` whether it asks when or how long, which nobody knows without a question. `asked_unit` is
    the unit that a question wants a plain number in, `rank` what it wants the number of ("on which day"), `subject` of
    whom it wants a word. `may_be_interval` says that a pair could be the numbers between its items.
    """

    form: Form = Form.ANY
    count: int = 1
    labels: tuple[str, ...] = ()
    unit: Unit | None = None
    is_number: bool = False
    asks_count: bool = False
    asks_time: bool | None = None
    asks_percent: bool = False
    asked_unit: tuple[str, Unit] | None = None
    rank: str = ""
    subject: str = ""
    may_be_interval: bool = False

    @property
    def is_verbal(self) -> bool:
        """Whether the answer is words and no mathematics."""
        return self.form in (Form.WORDS, Form.YES_NO)


ANYTHING = Expectation()
WORDS = Expectation(Form.WORDS)


@lru_cache(maxsize=1024)
def expect(reference: str) -> Expectation:
    """The form of a reference."""
    text = normalise(reference)
    text = ", ".join(read_division(text) or (text,))
    if len(text) > MAX_CHARACTERS:
        return ANYTHING
    if text.lower() in YES_NO:
        return Expectation(Form.YES_NO)
    if is_wordy(text) or is_empty_set(text):
        return WORDS
    if read_clock(text) is not None:
        return Expectation(Form.CLOCK)
    quantity = read_quantity(text)
    if read_number(quantity.body) is not None:
        return Expectation(Form.SCALAR, unit=quantity.unit, is_number=True)
    if RATIO.fullmatch(text):
        return Expectation(Form.RATIO)
    shape = read_shape(text)
    if isinstance(shape, Assignment):
        value = read_shape(shape.value)
        is_function = isinstance(value, Scalar) and HAS_VARIABLE.search(value.text)
        shape = Relation(shape.name, "=", shape.value) if is_function else value
    match shape:
        case Relation(sign="≠" | "<" | ">" | "≤" | "≥"):
            return Expectation(Form.REGION)
        case Region() | Group(brackets="(]" | "[)" | "[]"):
            return Expectation(Form.REGION)
        case Relation():
            return Expectation(Form.EQUATION)
        case Matrix():
            return ANYTHING
        case Group("tuple", items) as group:
            return Expectation(Form.TUPLE, len(items), may_be_interval=may_be_intervals(group))
        case Group(_, items):
            labels = read_labels(items)
            return Expectation(Form.LIST, len(items), tuple(labels or ()))
    return Expectation(Form.SCALAR if "=" not in text else Form.ANY, unit=quantity.unit)
