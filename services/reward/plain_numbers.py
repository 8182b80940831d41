"""Judges answers that are plain numbers without a computer algebra system."""

from __future__ import annotations

import re
from decimal import Decimal

# Longer numbers go to the computer algebra system, which has a deadline.
MAX_CHARACTERS = 64
PLAIN_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
# A number was asked for: an answer that repeats the sum has not been worked out.
UNEVALUATED = re.compile(r"[0-9. ()+*/×÷·-]*[0-9).] *[+*/×÷·-][0-9. ()+*/×÷·-]*")
FRACTION = re.compile(r"[+-]? *[0-9]+ */ *[0-9]+|[0-9]+ [0-9]+/[0-9]+")
# math-verify compares floats rounded to six places; numbers that are this near are left to it.
NEAR = Decimal("0.00001")


def compare_plainly(reference: str, answer: str) -> bool | None:
    """Whether the answer equals the reference; None when this is not for plain numbers to decide.

    The same text is the same answer, whatever it is. Sums and products of numbers do not equal a number, because they
    are the question and not its answer; fractions may.
    """
    reference, answer = normalize(reference), normalize(answer)
    if reference and reference == answer:
        return True
    expected, found = parse_plain_number(reference), parse_plain_number(answer)
    if expected is None:
        return None
    if found is None:
        return False if UNEVALUATED.fullmatch(answer) and not FRACTION.fullmatch(answer) else None
    if expected == found:
        return True
    is_integral = expected == expected.to_integral_value() and found == found.to_integral_value()
    if is_integral or abs(expected - found) > NEAR * max(Decimal(1), abs(expected)):
        return False
    return None


def normalize(text: str) -> str:
    """The text without surrounding blanks, dollar signs and final full stop, and with single blanks inside."""
    return " ".join(text.strip().strip("$").removesuffix(".").split())


def parse_plain_number(text: str) -> Decimal | None:
    """An integer or decimal in ASCII digits; None for anything else."""
    if len(text) > MAX_CHARACTERS or not PLAIN_NUMBER.fullmatch(text):
        return None
    return Decimal(text)
