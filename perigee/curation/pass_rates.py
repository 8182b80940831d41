"""What samples of a model tell of a prompt: how hard it is, and whether its answer is guessed (k1.5 section 2.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from perigee.curation.findings import Decision, Finding

TRIVIAL = "trivial"
EASY_TO_HACK = "easy to hack"
UNDETERMINED = "undetermined"


@dataclass(frozen=True)
class SampleCounts:
    """Verdicts of a prompt's samples. `failed` ones could not be judged and tell nothing about the prompt."""

    correct: int = 0
    wrong: int = 0
    ungradable: int = 0
    failed: int = 0

    @property
    def judged(self) -> int:
        """Samples with a verdict; one that offers nothing to grade has not passed."""
        return self.correct + self.wrong + self.ungradable

    def to_details(self) -> dict[str, int]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_details(cls, details: Mapping[str, Any]) -> SampleCounts:
        """The counts that `to_details` wrote."""
        return cls(**{name: details[name] for name in ("correct", "wrong", "ungradable", "failed")})


def decide_difficulty(
    question_id: str, counts: SampleCounts, *, min_judged: int, trivial_pass_rate: float | None
) -> Finding:
    """Difficulty is 1 - pass rate over the judged samples.

    Aside when fewer than `min_judged` were judged; dropped when the pass rate reaches `trivial_pass_rate`, unless that
    is None.
    """
    details: dict[str, Any] = counts.to_details()
    if counts.judged < max(1, min_judged):
        return Finding(question_id, Decision.ASIDE, UNDETERMINED, details)
    pass_rate = counts.correct / counts.judged
    details["difficulty"] = round(1 - pass_rate, 6)
    if trivial_pass_rate is not None and pass_rate >= trivial_pass_rate:
        return Finding(question_id, Decision.DROP, TRIVIAL, details)
    return Finding(question_id, details=details)


def decide_guessing(question_id: str, counts: SampleCounts, *, min_judged: int) -> Finding:
    """Dropped when any guess was right; aside when none was and fewer than `min_judged` were judged."""
    details = counts.to_details()
    if counts.correct:
        return Finding(question_id, Decision.DROP, EASY_TO_HACK, details)
    if counts.judged < max(1, min_judged):
        return Finding(question_id, Decision.ASIDE, UNDETERMINED, details)
    return Finding(question_id, details=details)


def least_judged(samples: int, share: float) -> int:
    """How many of `samples` must be judged."""
    return min(samples, math.ceil(samples * share - 1e-9))
