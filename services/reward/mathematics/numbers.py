"""Numbers that need no algebra: integers, decimals, fractions, mixed numbers, powers of ten, words."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from services.reward.mathematics.number_words import read_number_words

# Longer ones are left to the algebra, which has a deadline.
MAX_CHARACTERS = 100
MAX_EXPONENT = 400
# A decimal of as many significant digits stands for the number that it rounds to.
PRECISE_DIGITS = 6
# From here on a difference is floating-point noise.
NOISE_DIGITS = 10
DECIMAL = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
NEGATED = re.compile(r"-\s*\(([^()]*)\)")
PLAIN = re.compile(rf"([+-]*)\s*({DECIMAL})")
FRACTION = re.compile(
    rf"(?P<sign>[+-]*)\s*(?:(?P<whole>[0-9]+)\s*)?\\frac\{{\s*(?P<up>[+-]?\s*{DECIMAL})\s*\}}\{{\s*(?P<down>[+-]?\s*{DECIMAL})\s*\}}"
    rf"|(?P<sign2>[+-]*)\s*(?:(?P<whole2>[0-9]+)(?:\s+|\s+and\s+))?(?P<up2>{DECIMAL})\s*/\s*(?P<down2>[+-]?{DECIMAL})"
)
SCIENTIFIC = re.compile(rf"([+-]*)\s*(?:({DECIMAL})\s*\*\s*)?10\^\{{?([+-]?[0-9]+)\}}?")
# A number was asked for: an answer that repeats the sum has not been worked out.
UNEVALUATED = re.compile(r"[0-9. ()+*/-]*[0-9).] *[+*/-][0-9. ()+*/-]*")


# 0.\overline{3}, 0.\bar 3, 0.(3); 0.333…; "thirteen (13)".
REPEATING = re.compile(
    r"([+-]*)\s*([0-9]*\.[0-9]*)(?:\\(?:overline|bar|dot|overbar)\s*\{?\s*([0-9]+)\s*\}?|\(([0-9]+)\)|\{([0-9]+)\})"
)
TRAILING = re.compile(r"([+-]*)\s*([0-9]*\.[0-9]{2,})…")
TWICE = re.compile(r"([^()]+?)\s*\(([^()]+)\)")


@dataclass(frozen=True)
class Number:
    """An exact value; `digits` counts the significant ones and `places` those after the point of a decimal."""

    value: Fraction
    is_decimal: bool = False
    digits: int = 0
    places: int = 0


def read_number(text: str) -> Number | None:
    """A number in the notation of `normalise`; None for anything else."""
    text = text.strip()
    while text.startswith("(") and text.endswith(")") and ")" not in text[1:-1]:
        text = text[1:-1].strip()
    if not text or len(text) > MAX_CHARACTERS:
        return None
    if match := NEGATED.fullmatch(text):
        inner = read_number(match[1])
        return None if inner is None else replace(inner, value=-inner.value)
    if match := PLAIN.fullmatch(text):
        return read_plain(sign_of(match[1]), match[2])
    if match := SCIENTIFIC.fullmatch(text):
        return read_scientific(match)
    if match := FRACTION.fullmatch(text):
        return read_fraction(match)
    if match := REPEATING.fullmatch(text):
        return read_repeating(sign_of(match[1]), match[2], match[3] or match[4] or match[5])
    if match := TRAILING.fullmatch(text):
        return read_trailing(sign_of(match[1]), match[2])
    if match := TWICE.fullmatch(text):
        first, second = read_number(match[1]), read_number(match[2])
        return first if first and second and first.value == second.value else None
    words = read_number_words(text)
    return None if words is None else Number(words)


def sign_of(signs: str) -> int:
    """-1 or 1."""
    return -1 if signs.count("-") % 2 else 1


def read_plain(sign: int, text: str) -> Number:
    """An integer or a decimal."""
    _, point, after = text.partition(".")
    is_decimal = bool(point and after.strip("0"))
    digits = len(text.replace(".", "").lstrip("0"))
    return Number(sign * Fraction(text.rstrip(".") or "0"), is_decimal, digits, len(after))


def read_repeating(sign: int, text: str, block: str) -> Number:
    """A decimal whose last digits go on for ever."""
    places = len(text.partition(".")[2])
    value = Fraction(text.rstrip(".") or "0") + Fraction(int(block), 10**places * (10 ** len(block) - 1))
    return Number(sign * value)


def read_trailing(sign: int, text: str) -> Number | None:
    """A decimal with dots after it: its last digits go on when they were written twice, single ones three times."""
    whole, _, digits = text.partition(".")
    for length in range(1, len(digits) // 2 + 1):
        block = digits[-length:]
        times = 3 if length == 1 else 2
        if digits.endswith(block * times):
            return read_repeating(sign, f"{whole}.{digits.removesuffix(block)}", block)
    return None


def read_scientific(match: re.Match[str]) -> Number | None:
    """A power of ten with or without a factor."""
    exponent = int(match[3])
    if abs(exponent) > MAX_EXPONENT:
        return None
    factor = read_plain(sign_of(match[1]), match[2] or "1")
    return Number(factor.value * Fraction(10) ** exponent)


def read_fraction(match: re.Match[str]) -> Number | None:
    """A fraction or a mixed number; None where the denominator is zero or a whole number stands before no part of 1."""
    up = Fraction((match["up"] or match["up2"]).replace(" ", "").rstrip("."))
    down = Fraction((match["down"] or match["down2"]).replace(" ", "").rstrip("."))
    if down == 0:
        return None
    value = up / down
    whole = match["whole"] or match["whole2"]
    if whole is not None:
        if not 0 < value < 1:
            return None
        value += int(whole)
    return Number(sign_of(match["sign"] or match["sign2"] or "") * value)


def numbers_agree(expected: Number, found: Number) -> bool:
    """Whether two numbers are the same.

    A decimal of at least six significant digits agrees with the number that it rounds or truncates; decimals of ten
    digits agree when they differ by floating-point noise. A decimal of fewer digits is only what it says.
    """
    if expected.value == found.value:
        return True
    difference = abs(expected.value - found.value)
    decimals = [number for number in (expected, found) if number.is_decimal]
    if not decimals:
        return False
    if max(number.digits for number in decimals) >= NOISE_DIGITS and difference * 10**9 <= abs(expected.value):
        return True
    coarser = min(decimals, key=lambda number: number.places)
    is_finer = len(decimals) == 1 or decimals[0].places != decimals[1].places
    return is_finer and coarser.digits >= PRECISE_DIGITS and difference < Fraction(1, 10**coarser.places)


def is_unevaluated(text: str) -> bool:
    """Whether a text is a sum or product of plain numbers; a fraction is not."""
    return len(text) <= MAX_CHARACTERS * 10 and UNEVALUATED.fullmatch(text) is not None and read_number(text) is None
