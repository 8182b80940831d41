"""A value with what stands around it: unit, currency, per cent sign, time of day."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from services.reward.mathematics.normalise import normalise
from services.reward.mathematics.number_words import is_number_word
from services.reward.mathematics.numbers import read_number
from services.reward.mathematics.units import NAMES, Unit, first_unit, read_unit

CURRENCY = re.compile(r"^([+-]?)\s*(US\$|\$|€|£|₹|¥|USD|EUR|GBP|Rs\.?)\s*(?=[+-]?\s*[0-9.(])")
APPROXIMATELY = re.compile(
    r"^(?:≈|~|about|approximately|approx\.?|roughly|around|exactly|only|just|a total of|the number|=|is|equals)\s*",
    re.IGNORECASE,
)
# "35 (students)".
NAMED = re.compile(r"\s*\(([A-Za-z][A-Za-z ]{2,})\)$")
PERCENT = re.compile(r"\s*%(?P<rest>.*)$")
DEGREE = re.compile(r"\s*(?:°|degrees?\b)\s*(?P<scale>[CF]\b|celsius|fahrenheit)?", re.IGNORECASE)
# A number directly before a unit of two letters or more, "240cm".
ATTACHED = re.compile(r"([+-]?[0-9.]+)([A-Za-z]{2}[A-Za-z/^{}0-9]*)")
HALF = r"\s*(?P<half>[ap])?\.?\s*(?(half)m\b\.?)"
DAYTIMES = re.compile(r"(?<=[0-9])(?:\s*o'clock)?,?\s+(?:in the (?:(?P<early>morning)|afternoon|evening)|at night)\b")
CLOCK = re.compile(r"(?P<hour>[0-9]{1,2}):(?P<minute>[0-9]{2})(?::(?P<second>[0-9]{2}))?" + HALF, re.IGNORECASE)
HOUR = re.compile(r"(?P<hour>[0-9]{1,2})(?:\s*o'clock\b)?" + HALF, re.IGNORECASE)
NAMED_HOURS = {"noon": "p", "midnight": "a"}
# "11th", "the 3rd day".
ORDINAL = re.compile(r"(?:the\s+)?(?P<rank>[0-9]{1,9})(?P<end>st|nd|rd|th)\b(?:\s+[A-Za-z]+)?", re.IGNORECASE)
# A variable is no value before "m", but it is before "meters".
ENDS_TERM = re.compile(r"(?:^(?!a$)|[0-9+\-*/^{(]\s*)[A-Za-z]$", re.IGNORECASE)
UNIT_WORD = re.compile(r"(?:(?:square|cubic) )?(?:[A-Za-z]{4,}|[ckm]m|kg|ft)\b.*")
NOUNS = re.compile(r"(?:[A-Za-z'-]+(?:\^\{[23]\})?[ ,]*){1,8}")
COMPOUND = re.compile(r"([0-9.]+(?:\s+[0-9]+/[0-9]+)?)\s*([A-Za-z]+)(?:\s*,?\s*(?:and\s+)?|$)")
MAX_AMOUNT_CHARACTERS = 60
DEGREES = Unit(Fraction(1), (("angle", 1),))
CELSIUS, FAHRENHEIT = NAMES["°C"], NAMES["°F"]
RADIANS = NAMES["rad"]


@dataclass(frozen=True)
class Quantity:
    """A value in the notation of `normalise`, and its unit where there is one that the table knows."""

    body: str
    unit: Unit | None = None
    is_percent: bool = False


@dataclass(frozen=True)
class Clock:
    """A time of day; `half` is "a", "p" or unknown."""

    hour: int
    minute: int
    half: str
    second: int = 0


def read_quantity(text: str) -> Quantity:
    """Parts a value from its unit; text that has none is the value."""
    text = APPROXIMATELY.sub("", NAMED.sub(r" \1", text.strip()))
    if read_number(text) is not None:
        return Quantity(text)
    currency = CURRENCY.match(text)
    if currency:
        unit = read_unit({"US$": "$", "Rs.": "Rs"}.get(currency[2], currency[2]))
        inner = read_quantity(currency[1] + text[currency.end() :])
        return Quantity(inner.body, unit)
    compound = read_compound(text)
    if compound is not None:
        return compound
    percent = PERCENT.search(text)
    if percent and (not percent["rest"].strip() or NOUNS.fullmatch(percent["rest"].strip())):
        return Quantity(text[: percent.start()].strip(), is_percent=True)
    return read_trailing_unit(text)


def read_trailing_unit(text: str) -> Quantity:
    """A value with a unit, or with nouns that count something, after it."""
    degree = DEGREE.search(text)
    if degree and not text[degree.end() :].strip(" .") and not re.search(r"[A-Za-z]", text[: degree.start()][-1:]):
        scale = (degree["scale"] or "").lower()[:1]
        return Quantity(text[: degree.start()].strip(), {"c": CELSIUS, "f": FAHRENHEIT}.get(scale, DEGREES))
    attached = ATTACHED.fullmatch(text)
    if attached and (unit := read_unit(attached[2])) is not None:
        return Quantity(attached[1], unit)
    ordinal = ORDINAL.fullmatch(text)
    if ordinal and ordinal["end"].lower() == ending_of(int(ordinal["rank"])):
        return Quantity(ordinal["rank"])
    for match in re.finditer(r"(?<=[^\s*/+<>=-]) +(?=[A-Za-z$€£])", text):
        body, phrase = text[: match.start()].strip(), text[match.end() :].strip()
        if not (ends_value(body) or (ENDS_TERM.search(body) and UNIT_WORD.fullmatch(phrase))) or body.endswith(
            ("\\frac", "\\sqrt")
        ):
            continue
        if phrase.startswith("and "):
            continue  # two and a half hours
        unit = read_unit(phrase)
        if unit is not None:
            return Quantity(body, unit)
        if NOUNS.fullmatch(phrase) and re.match(r"[A-Za-z'-]{3}", phrase) and not is_number_word(phrase.split()[0]):
            return Quantity(body, first_unit(phrase))
    return Quantity(text)


def ending_of(rank: int) -> str:
    """The letters after an ordinal number."""
    return "th" if rank % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(rank % 10, "th")


def ends_value(body: str) -> bool:
    """Whether a value may end here: after a digit, a bracket, a constant, a variable, or a number in words."""
    return bool(body) and (body[-1] in "0123456789.)}|!²³" or body.endswith("\\pi") or read_number(body) is not None)


def read_compound(text: str) -> Quantity | None:
    """Amounts of one dimension that add up, "2 hours and 30 minutes", in the first unit; None of fewer than two."""
    if not text[:1].isdigit() or not text[-1:].isalpha():
        return None
    total, largest, last, position, count = Fraction(0), None, None, 0, 0
    while position < len(text):
        match = COMPOUND.match(text, position)
        number = read_number(match[1]) if match else None
        unit = read_unit(match[2]) if match else None
        if match is None or number is None or unit is None or (largest and largest.dimension != unit.dimension):
            return None
        if last is not None and unit.factor >= last.factor:
            return None  # "4 cm and 9 cm" are two lengths
        last = unit
        largest = largest or unit
        total += number.value * unit.factor / largest.factor
        position, count = match.end(), count + 1
    return Quantity(str(total), largest) if count > 1 else None


def express_in(answer: str, name: str, unit: Unit) -> str:
    """An amount in another unit of what it measures, "2 h 15 min" as "135 minutes"; any other answer as it is."""
    quantity = read_quantity(normalise(answer)) if len(answer) <= MAX_AMOUNT_CHARACTERS else None
    number = read_number(quantity.body) if quantity else None
    if quantity is None or quantity.unit is None or number is None or quantity.unit.factor == unit.factor:
        return answer
    return (
        f"{number.value * quantity.unit.factor / unit.factor} {name}"
        if quantity.unit.dimension == unit.dimension
        else answer
    )


def read_clock(text: str) -> Clock | None:
    """A time of day, "3:30 PM" or "15:30"; None for anything else."""
    if named := NAMED_HOURS.get(text.lower().removeprefix("12 ")):
        return Clock(12, 0, named)
    match = CLOCK.fullmatch(text) or HOUR.fullmatch(text)
    if match is None or text.isdigit():
        return None
    parts = match.groupdict(default="")
    hour, minute, second = (int(parts.get(name) or 0) for name in ("hour", "minute", "second"))
    # "3:01:12" alone is a ratio.
    if hour > 24 or max(minute, second) > 59 or (parts.get("second") and not parts["half"]):
        return None
    return Clock(hour, minute, parts["half"].lower(), second)


def name_halves(text: str) -> str:
    """The text with "am" and "pm" for "in the morning" and the like."""
    return DAYTIMES.sub(lambda match: " am" if match["early"] else " pm", text)


def clocks_agree(expected: Clock, found: Clock) -> bool:
    """Whether two times of day are the same; one that does not say which half of the day it means fits both."""
    hours = possible_hours(expected) & possible_hours(found)
    return (expected.minute, expected.second) == (found.minute, found.second) and bool(hours)


def possible_hours(clock: Clock) -> set[int]:
    """The hours of 24 that a clock may mean."""
    if not clock.half:
        return {clock.hour % 24} if clock.hour > 12 or clock.hour == 0 else {clock.hour % 24, (clock.hour + 12) % 24}
    return {clock.hour % 12 + (12 if clock.half == "p" else 0)}
