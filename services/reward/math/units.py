"""Units of measurement and money, values that carry one, and times of day."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from services.reward.math.numbers import is_number_word, read_number


@dataclass(frozen=True)
class Unit:
    """Unit of measurement as a multiple of its dimension's base unit; a dimension holds (base, power) pairs."""

    factor: Fraction
    dimension: tuple[tuple[str, int], ...]


# Dimension, size, and the unit's names; the first line of a dimension is its base. Names in capitals are as written.
TABLE = """
length    1          m meter metre
length    1/1000     mm millimeter millimetre
length    1/100      cm centimeter centimetre
length    1000       km kilometer kilometre
length    0.0254     in inch inche
length    0.3048     ft foot feet
length    0.9144     yd yard
length    1609.344   mi mile
volume    1/1000     l L liter litre
volume    1/1000000  ml mL milliliter millilitre cc
mass      1          kg kilogram kilo
mass      1/1000     g gram gm
mass      1/1000000  mg milligram
mass      0.45359237 lb pound
mass      0.028349523125 oz ounce
time      1          s sec second
time      1/1000     ms millisecond
time      60         min minute
time      3600       h hr hour
time      86400      d day
time      604800     wk week
month     1          month
month     12         yr year
angle     1          ° deg degree
radian    1          rad radian
speed     1609.344/3600 mph
speed     1000/3600  kmph kph kmh
celsius   1          °C celsius
fahrenheit 1         °F fahrenheit
usd       1          $ USD dollar usd
usd       1/100      ¢ cent
eur       1          € EUR euro
gbp       1          £ GBP
inr       1          ₹ INR Rs rupee
jpy       1          ¥ JPY yen
energy    1          J joule
power     1          W watt
"""
DERIVED = {"area": (("length", 2),), "volume": (("length", 3),), "speed": (("length", 1), ("time", -1))}
HALVES_OF_DAY = ("am", "pm", "a.m", "p.m", "a.m.", "p.m.")
POWERS = {"²": 2, "^2": 2, "^{2}": 2, "³": 3, "^3": 3, "^{3}": 3}
POWER_WORDS = {"square": 2, "squared": 2, "sq": 2, "cubic": 3, "cubed": 3, "cu": 3}
FACTOR = re.compile(r"([A-Za-z°$€£¥₹¢Ω]+)(²|³|\^\{?[23]\}?)?(?:\^\{?(-[123])\}?)?")


def build_names() -> dict[str, Unit]:
    """Returns every name of every unit, plurals of words among them."""
    names = {}
    for line in TABLE.strip().splitlines():
        base, size, *aliases = line.split()
        numerator, _, denominator = size.partition("/")
        unit = Unit(Fraction(numerator) / Fraction(denominator or 1), DERIVED.get(base, ((base, 1),)))
        for alias in aliases:
            names[alias] = unit
            if len(alias) > 3 or alias in ("day", "bit", "ton", "lb", "yr", "hr", "min", "sec", "wk", "amp"):
                names[alias + "s"] = unit
    return names


NAMES = build_names()


def is_unit_phrase(text: str) -> bool:
    """Returns whether a text is a unit of the table, a per cent sign, or half of the day."""
    return text in ("%", "\\%", "percent") or text.lower() in HALVES_OF_DAY or read_unit(text) is not None


@lru_cache(maxsize=4096)
def read_unit(text: str) -> Unit | None:
    """Reads the unit that a text names, "km/h", "square centimeters" or "m s^{-1}"; None when it names none."""
    text = re.sub(r"\b(?:degrees?|deg|°)\s*(?=[CF]\b|celsius|fahrenheit)", "°", text.strip(), flags=re.IGNORECASE)
    text = re.sub(r"°\s*celsius", "°C", text, flags=re.IGNORECASE)
    text = re.sub(r"°\s*fahrenheit", "°F", text, flags=re.IGNORECASE)
    over, *under = re.split(r"\s*/\s*|\s+per\s+|\bper\s+", text)
    factor, powers = Fraction(1), dict[str, int]()
    for part, direction in [(over, 1), *((each, -1) for each in under)]:
        product = read_product(part, direction)
        if product is None:
            return None
        factor *= product[0]
        for base, power in product[1].items():
            powers[base] = powers.get(base, 0) + power
    return Unit(factor, tuple(sorted((base, power) for base, power in powers.items() if power)))


def read_product(text: str, direction: int) -> tuple[Fraction, dict[str, int]] | None:
    """Returns factor and powers of "kg m^2" or "square feet"; None when a word of it is no unit."""
    words = text.replace("*", " ").replace("·", " ").split()
    factor, powers, pending = Fraction(1), dict[str, int](), 1
    for word in words:
        if word.lower() in ("square", "sq", "sq.", "cubic", "cu", "cu."):
            pending = POWER_WORDS[word.lower().rstrip(".")]
            continue
        if word.lower() in ("squared", "cubed") and len(powers) == 1:
            times = POWER_WORDS[word.lower()]
            factor, powers = factor**times, {base: power * times for base, power in powers.items()}
            continue
        match = FACTOR.fullmatch(word)
        unit = find_name(match[1]) if match else None
        if match is None or unit is None:
            return None
        power = direction * pending * (int(match[3]) if match[3] else POWERS.get(match[2] or "", 1))
        pending = 1
        factor *= unit.factor**power
        for base, times in unit.dimension:
            powers[base] = powers.get(base, 0) + times * power
    return (factor, powers) if words and powers else None


def find_name(word: str) -> Unit | None:
    """Returns the unit of one name; words in any case, symbols as written."""
    return NAMES.get(word) or (NAMES.get(word.lower()) if len(word) > 3 else None)


def first_unit(text: str) -> Unit | None:
    """Reads the longest unit that a phrase begins with, "cm" of "cm long"; None when its first word is none."""
    words = text.split()
    for count in range(min(len(words), 4), 0, -1):
        unit = read_unit(" ".join(words[:count]))
        if unit is not None:
            return unit
    return None


CURRENCY = re.compile(r"^([+-]?)\s*(US\$|\$|€|£|₹|¥|USD|EUR|GBP|Rs\.?)\s*(?=[+-]?\s*[0-9.(])")
CURRENCY_SIGNS = tuple("$€£₹¥¢")
APPROXIMATELY = re.compile(
    r"^(?:≈|~|about|approximately|approx\.?|roughly|around|exactly|only|just|a total of|the number|=|is|equals)\s*",
    re.IGNORECASE,
)
PERCENT = re.compile(r"\s*%(?P<rest>.*)$")
DEGREE = re.compile(r"\s*(?:°|degrees?\b)\s*(?P<scale>[CF]\b|celsius|fahrenheit)?", re.IGNORECASE)
# A number directly before a unit of two letters or more, "240cm".
ATTACHED = re.compile(r"([+-]?[0-9.]+)([A-Za-z]{2}[A-Za-z/^{}0-9]*)")
# A variable is no value before "m", but it is before "meters".
ENDS_TERM = re.compile(r"(?:^(?!a$)|[0-9+\-*/^{(]\s*)[A-Za-z]$", re.IGNORECASE)
UNIT_WORD = re.compile(r"(?:(?:square|cubic) )?(?:[A-Za-z]{4,}|[ckm]m|kg|ft)\b.*")
NOUNS = re.compile(r"(?:[A-Za-z'-]+(?:\^\{[23]\})?[ ,]*){1,8}")
DEGREES = Unit(Fraction(1), (("angle", 1),))
CELSIUS, FAHRENHEIT = NAMES["°C"], NAMES["°F"]
RADIANS = NAMES["rad"]


@dataclass(frozen=True)
class Quantity:
    """Value in the notation of `normalise`, with its unit where the table has it."""

    body: str
    unit: Unit | None = None
    is_percent: bool = False


def read_quantity(text: str) -> Quantity:
    """Splits a value from its unit; a text without a unit is the value."""
    text = APPROXIMATELY.sub("", text.strip())
    if read_number(text) is not None:
        return Quantity(text)
    currency = CURRENCY.match(text)
    if currency:
        unit = read_unit({"US$": "$", "Rs.": "Rs"}.get(currency[2], currency[2]))
        inner = read_quantity(currency[1] + text[currency.end() :])
        return Quantity(inner.body, unit)
    if text[-1:] in CURRENCY_SIGNS and read_number(text[:-1]) is not None:
        return Quantity(text[:-1].strip(), read_unit(text[-1]))
    percent = PERCENT.search(text)
    if percent and (not percent["rest"].strip() or NOUNS.fullmatch(percent["rest"].strip())):
        return Quantity(text[: percent.start()].strip(), is_percent=True)
    return read_trailing_unit(text)


def read_trailing_unit(text: str) -> Quantity:
    """Reads a value with a unit, or with nouns that are counted, behind it."""
    degree = DEGREE.search(text)
    if degree and not text[degree.end() :].strip(" .") and not re.search(r"[A-Za-z]", text[: degree.start()][-1:]):
        scale = (degree["scale"] or "").lower()[:1]
        return Quantity(text[: degree.start()].strip(), {"c": CELSIUS, "f": FAHRENHEIT}.get(scale, DEGREES))
    attached = ATTACHED.fullmatch(text)
    if attached and (unit := read_unit(attached[2])) is not None:
        return Quantity(attached[1], unit)
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


def ends_value(body: str) -> bool:
    """Returns whether a value may end here: after a digit, a bracket, a constant, a variable, or a number in words."""
    return bool(body) and (body[-1] in "0123456789.)}|!²³" or body.endswith("\\pi") or read_number(body) is not None)
