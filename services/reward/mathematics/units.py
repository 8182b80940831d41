"""Units of measurement and money: what they measure, and how large they are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache


@dataclass(frozen=True)
class Unit:
    """A unit as a multiple of its dimension's base unit; a dimension holds (base, power) pairs."""

    factor: Fraction
    dimension: tuple[tuple[str, int], ...]


# Dimension, size, and the unit's names; the first line of a dimension is its base. Names in capitals are as written.
TABLE = """
length    1          m meter metre
length    1/1000     mm millimeter millimetre
length    1/100      cm centimeter centimetre
length    1/10       dm decimeter decimetre
length    1000       km kilometer kilometre
length    0.0254     in inch inche
length    0.3048     ft foot feet
length    0.9144     yd yard
length    1609.344   mi mile
area      10000      ha hectare
area      4046.8564224 acre
volume    1/1000     l L liter litre
volume    1/1000000  ml mL milliliter millilitre cc
volume    1/100000   cl cL centiliter centilitre
volume    0.003785411784 gal gallon
mass      1          kg kilogram kilo
mass      1/1000     g gram gm
mass      1/1000000  mg milligram
mass      1000       t tonne ton
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
kelvin    1          K kelvin
usd       1          $ USD dollar usd
usd       1/100      ¢ cent
eur       1          € EUR euro
gbp       1          £ GBP
inr       1          ₹ INR Rs rupee
jpy       1          ¥ JPY yen
force     1          N newton
energy    1          J joule
energy    1000       kJ kilojoule
power     1          W watt
power     1000       kW kilowatt
volt      1          V volt
ohm       1          Ω ohm
ampere    1          A ampere amp
hertz     1          Hz hertz
mole      1          mol mole
byte      1          byte
bit       1          bit
"""
DERIVED = {"area": (("length", 2),), "volume": (("length", 3),), "speed": (("length", 1), ("time", -1))}
CLOCK = ("am", "pm", "a.m", "p.m", "a.m.", "p.m.")
POWERS = {"²": 2, "^2": 2, "^{2}": 2, "³": 3, "^3": 3, "^{3}": 3}
POWER_WORDS = {"square": 2, "squared": 2, "sq": 2, "cubic": 3, "cubed": 3, "cu": 3}
FACTOR = re.compile(r"([A-Za-z°$€£¥₹¢Ω]+)(²|³|\^\{?[23]\}?)?(?:\^\{?(-[123])\}?)?")


def build_names() -> dict[str, Unit]:
    """Every name of every unit, plurals of words among them."""
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
    """Whether a text is a unit of the table, a per cent sign or a time of day."""
    return text in ("%", "\\%", "percent") or text.lower() in CLOCK or read_unit(text) is not None


@lru_cache(maxsize=4096)
def read_unit(text: str) -> Unit | None:
    """The unit that a text names, "km/h", "square centimeters" or "m s^{-1}"; None when it names none."""
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
    """Factor and powers of "kg m^2" or "square feet"; None when a word of it is no unit."""
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
    """A unit by one name; words in any case, symbols as written."""
    return NAMES.get(word) or (NAMES.get(word.lower()) if len(word) > 3 else None)


def first_unit(text: str) -> Unit | None:
    """The longest unit that a phrase begins with, "cm" of "cm long"; None when its first word is none."""
    words = text.split()
    for count in range(min(len(words), 4), 0, -1):
        unit = read_unit(" ".join(words[:count]))
        if unit is not None:
            return unit
    return None
