"""The math verifier's check, in its process: {"references": [...], "answer": "..."}."""

from __future__ import annotations

from typing import Any

from services.reward.mathematics.algebra import SympyAlgebra, UnreadableError, has_words, parse_reference
from services.reward.mathematics.compare import agree
from services.reward.mathematics.normalise import normalise
from services.reward.mathematics.words import words_agree

ALGEBRA = SympyAlgebra()
# Answers of every kind, so that the parser's tables and SymPy's modules are there before the first child is forked.
SAMPLES = (
    ("\\frac{1}{2}", "0.51"),
    ("3\\sqrt{2}", "\\sqrt{18}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("-\\cos 2x", "1-2\\cos^2 x"),
    ("\\frac{\\sqrt[3]{2}+\\ln 8}{\\pi}", "\\log_2 5"),
    ("(2x-1)(3x+4)", "\\frac{a_1-b}{c}"),
    ("y=2x+1", "2x-y+1=0"),
    ("5+5i", "e^{i\\theta}"),
    ("\\binom{5}{2}-3!", "|x-1|"),
    ("x^2+y^2>9", "x+y\\ge 2"),
)


def warm_up() -> None:
    """Loads everything that the first check would load."""
    for reference, answer in SAMPLES:
        check({"references": [reference], "answer": answer})
    parse_reference.cache_clear()


def check(request: dict[str, Any]) -> dict[str, str]:
    """Whether the answer is any of the references; raises whatever the algebra raises beside UnreadableError."""
    unreadable: UnreadableError | None = None
    for reference in request["references"]:
        try:
            if agree(reference, request["answer"], ALGEBRA):
                return {"status": "equal", "reason": ""}
        except UnreadableError as error:
            # What the reference lacks outweighs what the answer does.
            if error.is_reference and has_words(normalise(reference)):
                if words_agree(normalise(reference), normalise(request["answer"])):
                    return {"status": "equal", "reason": ""}
                continue  # prose is no mathematics, but it can be read
            unreadable = error if unreadable is None or error.is_reference else unreadable
    if unreadable is None:
        return {"status": "different", "reason": ""}
    side = "reference" if unreadable.is_reference else "answer"
    return {"status": "error" if unreadable.is_reference else "unreadable", "reason": f"the {side} {unreadable}"}
