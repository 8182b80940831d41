"""Where a sentence that tells a region says of something when it holds: "defined precisely when -3 ≤ x ≤ 3"."""

from __future__ import annotations

import re
from collections.abc import Sequence

from services.reward.mathematics.brackets import read_brackets
from services.reward.mathematics.formulas import unwrap
from services.reward.mathematics.normalise import normalise
from services.reward.mathematics.regions import interval_of, read_region
from services.reward.mathematics.runs import Run
from services.reward.mathematics.settings import drop_settings

BEFORE_CHARACTERS = 60
MAX_REGION_CHARACTERS = 200
REGIONAL = re.compile(r"[<>≤≥≠∪∞ℝ]|\\(?:leq?|geq?|neq?|infty|cup|lt|gt)(?![A-Za-z])|[\[(][^()\[\]]*,[^()\[\]]*[)\]]")
# A condition after such words is the answer, and not the circumstance of another one.
HOLDS = re.compile(
    r"\b(?:(?:exactly|precisely|only|just|true|holds?|valid|satisfied|defined|continuous|differentiable|converges?"
    r"|convergent|positive|negative|nonnegative|increasing|decreasing|if and only|real"
    r"|numbers|values|those|all \$?[a-z]\$?)"
    r"\s+(?:when|if|for|on|in|with|where|such that|satisfying)|iff)\s+(?:all\s+|every\s+|any\s+)?$",
    re.IGNORECASE,
)
# What is solved already, so that a condition after it only explains it.
SOLVED = re.compile(
    r"(?<![A-Za-z0-9^²)}])\$?[A-Za-z]\s*(?:[<>≤≥]|\\(?:leq?|geq?|lt|gt)(?![A-Za-z]))|∪|\\cup|∞|\\infty"
    r"|[\[(][^()\[\]]*,[^()\[\]]*[)\]]|[<>≤≥]\s*\$?[A-Za-z]\$?(?![A-Za-z0-9^(²])|\|[A-Za-z]\|"
)


def choose_regions(sentence: str, candidates: Sequence[Run]) -> list[Run]:
    """The stretches that may be the region that a sentence tells; none where there are no regions."""
    regions = [run for run in candidates if REGIONAL.search(run.text)]
    told = [run for run in regions if HOLDS.search(sentence[max(0, run.start - BEFORE_CHARACTERS) : run.start])]
    solved = [run for run in regions if is_solved(run)]
    if told and (not solved or told[-1] in solved):
        return told
    solved = [run for run in solved if "|" not in run.text] or solved
    return drop_settings(sentence, solved) or solved or drop_settings(sentence, regions) or regions


def is_solved(run: Run) -> bool:
    """Whether a stretch reads as a set of numbers."""
    text = normalise(unwrap(run.text[:MAX_REGION_CHARACTERS]))
    return read_region(text) is not None or interval_of(read_brackets(text)) is not None
