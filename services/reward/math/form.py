"""Form of an answer: worked out as far as its reference, or only the question again."""

from __future__ import annotations

import math
import re

from services.reward.math.notation import normalise, squeeze
from services.reward.math.numbers import read_number
from services.reward.math.units import read_quantity

# What is left to be worked out, by families whose members may stand for each other.
FAMILIES = {
    "integral": r"\\i+nt(?![a-z])",
    "sum": r"\\sum|\\prod|…",
    "divisor": r"(?<![a-z])(?:gcd|lcm)",
    "choice": r"\\binom|!|(?<![A-Za-z])[CP]\s*\(|\}\s*[CP]\s*_",
    "determinant": r"\\det|\\begin\{vmatrix",
    "remainder": r"(?<![a-z])(?:b|p)?mod(?![a-z])",
    "limit": r"\\lim",
    "derivative": r"\\frac\{\s*d[^{}]*\}\{\s*d[^{}]*\}",
    "logarithm": r"\\(?:log|ln|lg)(?![a-z])",
    "angle": r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?(?![a-z])",
    "root": r"\\sqrt",
    "extremum": r"\\(?:max|min)(?![a-z])",
    "rounding": r"\\[lr](?:floor|ceil)",
    "power": r"(?<![0-9.A-Za-z}])(?!10\^)[0-9.]+\s*\^\s*(?:\{\s*[0-9]+\s*\}|[0-9])",
}
PATTERNS = {name: re.compile(pattern) for name, pattern in FAMILIES.items()}
VARIABLE = re.compile(r"(?<![\\A-Za-z])[a-df-hj-z](?![A-Za-z])")
RELATION = re.compile(r"[<>≤≥≠≈∈]")
RADICAND = re.compile(r"\\sqrt\{\s*([0-9]{1,12})\s*\}")
FRACTION = re.compile(r"\\frac\{([0-9]+)\}\{([0-9]+)\}|([0-9]+)\s*/\s*([0-9]+)")
PERCENT = re.compile(r"percent|per cent|%", re.IGNORECASE)
PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
ASKS_SIMPLEST = re.compile(r"\b(?:simplif|simplest|lowest terms|reduced?\b|irreducible|common fraction)", re.IGNORECASE)
ASKS_FORM = re.compile(r"\b(?:writ|express|convert|factor|expand|notation|rewrit|chang|represent)", re.IGNORECASE)
ASKS_FACTORS = re.compile(r"\bfactor(?:i[sz])?(?:e|ed|ing|isation|ization)?\b", re.IGNORECASE)
MIN_REPEATED = 2
MAX_PROMPT = 4000
# Longer answers are hardly forms of a number.
MAX_CHARACTERS = 400


def find_fault(reference: str, answer: str, prompt: str) -> str:
    """Returns why an answer of the reference's value has not its form; empty where it has."""
    wanted, given = normalise(reference), normalise(answer)
    if squeeze(wanted) == squeeze(given) or len(given) > MAX_CHARACTERS:
        return ""
    if "=" not in wanted:
        given = given.rpartition("=")[2].strip()
    number = read_number(wanted)
    if number is not None and number.is_decimal:
        return ""
    quantity = read_quantity(given)
    body = quantity.body
    left = [name for name, pattern in PATTERNS.items() if pattern.search(body) and not pattern.search(wanted)]
    if number is not None and VARIABLE.search(body) and not RELATION.search(body):
        left = ["variable"]
    if left and read_number(given) is None:
        return f"it leaves a {left[0]} to be worked out"
    if quantity.is_percent and prompt and not PERCENT.search(prompt) and not read_quantity(wanted).is_percent:
        return "it is in per cent"
    if has_square_factor(given) and not has_square_factor(wanted):
        return "it leaves a root to be simplified"
    if ASKS_SIMPLEST.search(prompt) and is_reducible(given) and not is_reducible(wanted):
        return "it leaves a fraction to be reduced"
    if ASKS_FACTORS.search(prompt) and ")" in wanted and "(" not in given:
        return "it leaves an expression to be factored"
    return "it repeats the question" if repeats(wanted, given, prompt) else ""


def repeats(wanted: str, given: str, prompt: str) -> bool:
    """Returns whether an answer is an expression of the prompt in another form than the reference.

    A plain number is one only where another way of writing it is asked for.
    """
    answer = canonical(given)
    forms = {canonical(text) for text in (wanted, wanted.rpartition("=")[2], read_quantity(wanted).body)}
    if len(answer) < MIN_REPEATED or answer in forms:
        return False
    if read_number(given) is not None and not (ASKS_FORM.search(prompt) or ASKS_SIMPLEST.search(prompt)):
        return False
    place = re.escape(answer)
    return (
        re.search(rf"(?<![0-9a-zA-Z.]){place}(?![0-9a-zA-Z]|\.[0-9])", canonical(normalise_prompt(prompt))) is not None
    )


def canonical(text: str) -> str:
    """Returns a text without white space, with fractions of plain terms as a quotient."""
    text = squeeze(re.sub(r"\\frac\{([^{}]+)\}\{([^{}]+)\}", r"\1/\2", text))
    return re.sub(r"[{}\s]", "", text)


def normalise_prompt(prompt: str) -> str:
    """Returns a prompt in the notation of answers, with its words taken out."""
    sentences = re.split(r"(?<=[.?!:])\s+|\n+|\$", prompt[-MAX_PROMPT:])
    return " ; ".join(PROSE.sub(";", normalise(sentence)) for sentence in sentences if sentence.strip())


def has_square_factor(text: str) -> bool:
    """Returns whether an integer under a root has a square factor."""
    return any(
        number % (root * root) == 0
        for match in RADICAND.finditer(text)
        if (number := int(match[1])) > 3
        for root in (2, 3, 5, 7, 11, 13)
    )


def is_reducible(text: str) -> bool:
    """Returns whether a text is one fraction of integers that is not in lowest terms."""
    match = FRACTION.fullmatch(text)
    if match is None:
        return False
    up, down = (int(part) for part in match.groups() if part)
    return math.gcd(up, down) > 1
