"""Takes the expression out of the sentence around it."""

from __future__ import annotations

import re

from services.reward.mathematics.comparatives import read_comparatives
from services.reward.mathematics.conditions import SOLVED
from services.reward.mathematics.expectations import ANYTHING, Expectation, Form
from services.reward.mathematics.formulas import ELLIPSIS, SPAN, name_constant, name_repeating, unwrap
from services.reward.mathematics.number_words import read_rank
from services.reward.mathematics.parts import name_part
from services.reward.mathematics.predicates import PERCENT, choose_runs
from services.reward.mathematics.quantities import name_halves
from services.reward.mathematics.runs import FIGURE, SIGN, TRIMMED, balance, find_runs

PARENTHESIS = re.compile(
    r"(?<=[^-+*/=×·(\s])\s+\((?!\$|(?:mod|or|maybe|perhaps|possibly|alternatively)\b)[^()\\]*[a-z]{3}[^()\\]*\)"
)
# Where the explanation of an answer begins, and what explains an announced one, too.
ASIDE = (
    r",\s*(?:a (?:bit|little)|slightly|somewhat|much|far|well)\s|,?\s+(?:because|since|rather than|instead of"
    r"|that is(?=,)|i\.e\.?|which is (?:about|approximately|roughly"
    r"|around|the same))\b|,\s*not\s|,?\s+and not\s"
    r"|(?<![-+*/=×·(])\s+\((?!mod\b|both\b|inclusive|or\b|maybe\b|perhaps\b|possibly\b"
    r"|alternatively\b)(?=[^()\\]*[a-z]{3}|[^()\\]*(?:=|[0-9] [-+*/×] [0-9])[^()]*\)\W*$)"
    r"|,?\s+\(?(?:for|where|when|if|with|provided)\s+(?:that\s+|all\s+|any\s+|every\s+|real\s+|integers?\s+)*"
    r"\$?\\?[A-Za-z](?=\s*[=<>≤≥≠∈]|\s*\\(?:in|neq?|geq?|leq?)\b)"
    r"(?!.*\b(?:gives?|yields?|is|are|gets?|have|equals?|becomes?)\b)"
)
EXPLANATION = re.compile(
    ASIDE + r"|,?\s+(?:as|where|which|when|if|rather than|instead of|after|so|given|due to)\b|,\s*(?:not|and not|but)\b"
)
CONDITION = re.compile(r",?\s+\(?(?:for|where|when|if|with|provided)\b")
JOINED = re.compile(r"^(?:or|and)\s+")
RESTATES = re.compile(r",?\s+\(?(?:which|that is|i\.e)\b")
# What is cut only behind such an answer: conditions of a region, and a figure in per cent where one is asked for.
KEPT = {SOLVED: CONDITION, PERCENT: RESTATES}
REMARK = re.compile(ASIDE)
CHANCE = re.compile(r"(?:[0-9]+|[a-z-]+) (?:in|out of)(?: every)? (?:[0-9]+|[a-z-]+)", re.IGNORECASE)
NOT_BUT = re.compile(r"not\b.+?\bbut\s+(?:rather\s+)?(?P<rest>.+)")
# Words before the same in other words, and where the sentence goes on after it: ", i.e. half an hour, she walks".
RESTATED = re.compile(r"i\.e|that is")
RESUMED = re.compile(r",\s+(?=[a-z]+\s+[a-z]+)(?!and\b|or\b|which\b|so\b)")
BULLET = re.compile(r"^(?:[#>]+\s*|[-•]\s+(?=[A-Za-z])|(?:=>|⇒|→|∴)\s*)+")
EACH = re.compile(r"\b(?:an?|each|every)\s+(hour|minute|second|day|week|year)\b")
MODULUS = re.compile(r"\s*\(\s*mod\s+([0-9]+)\s*\)")
# "**Total**"; but 2**3 is a power.
EMPHASIS = re.compile(r"(?<![0-9A-Za-z)*])\*\*(?=[^\s*])([^*]{1,500}?)(?<=\S)\*\*(?![0-9*])")
# A full stop after emphasis, "**9**.".
MARKED_END = re.compile(r"(?<=[*_`])\.\s*$")


def isolate(sentence: str, *, first: bool, expectation: Expectation = ANYTHING) -> str:
    """The expression in a sentence: the one that the sentence announces where it is announced, else the last.

    A sentence without any mathematics is returned as it is.
    """
    keeps = SOLVED if expectation.form is Form.REGION else PERCENT if expectation.asks_percent else None
    if expectation.form is Form.CLOCK:
        sentence = name_halves(sentence)
    if expectation.is_number:
        sentence = name_part(sentence)
    if expectation.rank:
        sentence = read_rank(sentence, expectation.rank)
    sentence = FIGURE.sub(r"\1{\2}", trim_sentence(name_repeating(name_constant(sentence)), first=first, keeps=keeps))
    sentence = MODULUS.sub(r" \\pmod{\1}", sentence)
    if CHANCE.fullmatch(sentence):
        return sentence
    sentence = ELLIPSIS.sub("…", sentence) if not SPAN.search(sentence) else sentence
    if expectation.form is Form.REGION and (region := read_comparatives(unwrap(sentence))):
        return region
    runs = find_runs(sentence, keeps_colons=expectation.form is Form.RATIO)
    if not runs:
        return sentence.strip(TRIMMED + ".:")
    chosen = choose_runs(sentence, runs, expectation, first=first)
    return ", ".join(tidy(run.text) for run in chosen)


def tidy(run: str) -> str:
    """A stretch of mathematics without markup, dollar signs and punctuation around it."""
    return balance(JOINED.sub("", unwrap(run)).strip(TRIMMED).rstrip(",;:."))


def has_mathematics(sentence: str) -> bool:
    """Whether anything in a sentence reads as mathematics."""
    return bool(find_runs(trim_sentence(sentence, first=False)))


def trim_sentence(sentence: str, *, first: bool, words: bool = False, keeps: re.Pattern[str] | None = None) -> str:
    """The sentence without markup around it and, where it announces an answer, without its explanation.

    What `KEPT` has for `keeps` is no explanation as long as `keeps` is not found before it.
    """
    sentence = EACH.sub(r"per \1", EMPHASIS.sub(r"\1", sentence))
    sentence = BULLET.sub("", MARKED_END.sub("", sentence).strip(TRIMMED))
    remark = PARENTHESIS.search(sentence)
    if remark and (words or SIGN.search(sentence[: remark.start()])):
        sentence = PARENTHESIS.sub("", sentence)
    contrast = NOT_BUT.fullmatch(sentence) if first else None
    sentence = contrast["rest"] if contrast else sentence
    for match in (EXPLANATION if first else REMARK).finditer(sentence):
        before, rest = sentence[: match.start()], sentence[match.end() :]
        if RESTATED.search(match[0]):
            if "=" in rest and "=" not in before:
                continue  # "a multiple of 4, that is, n = 4m"
            if match[0].startswith(",") and SIGN.search(before) and (closing := RESUMED.search(rest)):
                return f"{before}, {rest[closing.end() :]}"
        # Inside of a formula nothing is explained, and before the answer neither.
        is_outside = len(re.findall(r"(?<!\\)\$", before)) % 2 == 0 or not SPAN.search(sentence)
        if keeps is not None and KEPT[keeps].match(match[0]) and not keeps.search(before):
            continue
        if before.rstrip().endswith((" or", " and")):
            continue  # "when x = 2 or when x = -5"
        if is_outside and before.strip(TRIMMED) and (first or words or SIGN.search(before)):
            return before
    return sentence
