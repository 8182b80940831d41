"""The math verifier's check, in its process: {"references": [...], "answer": "..."}."""

from __future__ import annotations

from typing import Any

from services.reward.math.algebra import SympyAlgebra, UnreadableError, parse_reference
from services.reward.math.compare import agree
from services.reward.math.notation import MAX_DEPTH, nesting, normalise
from services.reward.math.words import has_words, words_agree

ALGEBRA = SympyAlgebra()
# Answers of every kind, so that the parser's tables and SymPy's modules are there before the first child is forked.
SAMPLES = (
    ("\\frac{1}{2}", "0.51"),
    ("3\\sqrt{2}", "\\sqrt{18}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("-\\cos 2x", "1-2\\cos^2 x"),
    ("\\frac{\\sqrt[3]{2}+\\ln 8}{\\pi}", "\\log_2 5"),
    ("y=2x+1", "2x-y+1=0"),
    ("\\binom{5}{2}-3!", "|x-1|"),
    ("x^2+y^2>9", "x+y\\ge 2"),
)
MAX_REASON = 200


def warm_up() -> None:
    """Loads everything that the first check would load."""
    for reference, answer in SAMPLES:
        check({"references": [reference], "answer": answer})
    parse_reference.cache_clear()


def check(request: dict[str, Any]) -> dict[str, Any]:
    """Returns whether the answer is any of the references, and which.

    What the algebra cannot compare is told from the answer's side, unless the reference itself cannot be read.
    """
    fault: tuple[str, str] | None = None
    for text, status in (
        *((reference, "error") for reference in request["references"]),
        (request["answer"], "unreadable"),
    ):
        if nesting(text) > MAX_DEPTH:
            return {"status": status, "reason": f"{text[:20]!r} and so on nests brackets more than {MAX_DEPTH} deep"}
    for reference in request["references"]:
        try:
            if agree(reference, request["answer"], ALGEBRA):
                return {"status": "equal", "reason": reference}
        except UnreadableError as error:
            # What the reference lacks outweighs what the answer does.
            if error.is_reference and has_words(normalise(reference)):
                if words_agree(normalise(reference), normalise(request["answer"])):
                    return {"status": "equal", "reason": reference}
                continue  # prose is no mathematics, but it can be read
            if fault is None or error.is_reference:
                fault = (
                    ("error", f"the reference {error}") if error.is_reference else ("unreadable", f"the answer {error}")
                )
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = f"the answer cannot be compared: {type(error).__name__}: {error}"[:MAX_REASON]
            fault = fault or ("unreadable", reason)
    status, reason = fault or ("different", "")
    return {"status": status, "reason": reason}
