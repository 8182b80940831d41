"""Numbers that need no algebra: integers, decimals, fractions, mixed numbers, powers of ten, English words."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

COUNTED = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
SMALL = {word: number for number, word in enumerate(COUNTED.split())} | {
    word: 10 * number for number, word in enumerate(TENS.split(), start=2)
}
SIGNS = ("minus", "negative")
FIGURES = re.compile(r"[0-9]+(?:\.[0-9]+)?|[0-9]+/[0-9]+")
FRACTIONS = {"half": Fraction(1, 2), "a half": Fraction(1, 2), "one half": Fraction(1, 2)}

# Longer ones are left to the algebra, which has a deadline.
MAX_CHARACTERS = 100
MAX_EXPONENT = 400
# A decimal of as many significant digits stands for the number that it rounds to.
PRECISE_DIGITS = 6
# A decimal of as many digits was printed by a program, and its last ones are floating-point noise.
NOISE_DIGITS = 15
NOISE = Fraction(1, 10**13)
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


def is_number_word(word: str) -> bool:
    """Returns whether a word alone reads as a number."""
    return any(part in SMALL or part in SCALES or part == "hundred" for part in word.split("-"))


def read_number_words(text: str) -> Fraction | None:
    """Returns the value of a number in English words; None for anything else."""
    words = text.lower().replace("-", " ").replace(",", " ").split()
    sign = -1 if words and words[0] in SIGNS else 1
    words = words[1:] if sign < 0 else words
    if not any(word in SMALL or word in SCALES or word in ("hundred", "half") for word in words):
        return None
    value = FRACTIONS.get(" ".join(words)) or read_cardinal([word for word in words if word != "and"])
    return None if value is None else sign * value


def read_cardinal(words: list[str]) -> Fraction | None:
    """Reads "two hundred thirty four thousand five" and "1.3 million"."""
    if not words:
        return None
    total, group, last = Fraction(0), Fraction(0), Fraction(0)
    for index, word in enumerate(words):
        if word in SCALES:
            if index == 0:
                return None
            total += group * SCALES[word]
            group, last = Fraction(0), Fraction(0)
        elif word == "hundred":
            group = (group or Fraction(1)) * 100
            last = Fraction(100)
        elif word in SMALL and (last == 0 or (last >= 20 and SMALL[word] < last)):
            group += SMALL[word]
            last = Fraction(SMALL[word]) if SMALL[word] >= 20 else Fraction(1)
        elif index == 0 and FIGURES.fullmatch(word):
            group, last = Fraction(word), Fraction(1)
        else:
            return None
    return total + group


@dataclass(frozen=True)
class Number:
    """Exact value of a number; of a decimal also its significant digits and its places behind the point."""

    value: Fraction
    is_decimal: bool = False
    digits: int = 0
    places: int = 0


def read_number(text: str) -> Number | None:
    """Reads a number in the notation of `normalise`; None for anything else."""
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
    words = read_number_words(text)
    return None if words is None else Number(words)


def sign_of(signs: str) -> int:
    """Returns -1 or 1."""
    return -1 if signs.count("-") % 2 else 1


def read_plain(sign: int, text: str) -> Number:
    """Reads an integer or a decimal."""
    _, point, after = text.partition(".")
    is_decimal = bool(point and after.strip("0"))
    digits = len(text.replace(".", "").lstrip("0"))
    return Number(sign * Fraction(text.rstrip(".") or "0"), is_decimal, digits, len(after))


def read_repeating(sign: int, text: str, block: str) -> Number:
    """Reads a decimal whose last digits repeat without end."""
    places = len(text.partition(".")[2])
    value = Fraction(text.rstrip(".") or "0") + Fraction(int(block), 10**places * (10 ** len(block) - 1))
    return Number(sign * value)


def read_trailing(sign: int, text: str) -> Number | None:
    """Reads a decimal with dots behind it: its last digits repeat when written twice, a single one when three times."""
    whole, _, digits = text.partition(".")
    for length in range(1, len(digits) // 2 + 1):
        block = digits[-length:]
        times = 3 if length == 1 else 2
        if digits.endswith(block * times):
            return read_repeating(sign, f"{whole}.{digits.removesuffix(block)}", block)
    return None


def read_scientific(match: re.Match[str]) -> Number | None:
    """Reads a power of ten with or without a factor."""
    exponent = int(match[3])
    if abs(exponent) > MAX_EXPONENT:
        return None
    factor = read_plain(sign_of(match[1]), match[2] or "1")
    value = factor.value * Fraction(10) ** exponent
    if not factor.is_decimal or value.denominator == 1:
        return Number(value)
    return Number(value, is_decimal=True, digits=factor.digits, places=max(0, factor.places - exponent))


def read_fraction(match: re.Match[str]) -> Number | None:
    """Reads a fraction or a mixed number; None for a zero denominator or a whole number before no part of 1."""
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
    """Returns whether two numbers are the same.

    A decimal of at least six significant digits agrees with the number that it rounds or truncates, and one that a
    program printed in full agrees up to floating-point noise. A decimal of fewer digits, an integer and a fraction are
    exactly what they say.
    """
    if expected.value == found.value:
        return True
    difference = abs(expected.value - found.value)
    decimals = [number for number in (expected, found) if number.is_decimal]
    if not decimals:
        return False
    if max(number.digits for number in decimals) >= NOISE_DIGITS and difference <= NOISE * abs(expected.value):
        return True
    coarser = min(decimals, key=lambda number: number.places)
    is_finer = len(decimals) == 1 or decimals[0].places != decimals[1].places
    return is_finer and coarser.digits >= PRECISE_DIGITS and difference < Fraction(1, 10**coarser.places)


def is_unevaluated(text: str) -> bool:
    """Returns whether a text is a sum or product of plain numbers; a fraction is none."""
    return len(text) <= MAX_CHARACTERS * 10 and UNEVALUATED.fullmatch(text) is not None and read_number(text) is None
