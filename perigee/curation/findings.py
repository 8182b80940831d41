"""Findings about prompts: what a stage is given and finds, and the three decisions that follow from numbers.

Samples of a model show how hard a prompt is and whether its answer is guessed (k1.5 section 2.1); a set is balanced by
keeping at most so many prompts of one domain and one bucket of difficulty.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any


@dataclass(frozen=True)
class Question:
    """Prompt as the stages see it."""

    id: str
    text: str
    kind: str
    """Its verifier: math, code, ..."""
    reference: str = ""
    """The answer, where it is one text."""
    domain: str = ""
    """Empty while it is unknown."""
    difficulty: float | None = None
    """Of the input, or 1 - pass rate once that is measured."""
    images: tuple[str, ...] = ()
    """Digests of its pictures, in order."""


class Decision(Enum):
    """KEEP and DROP are decided; UNDECIDED: too little is known."""

    KEEP = "keep"
    DROP = "drop"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Finding:
    """Finding of a stage on one prompt: whether it stays, why not, and the evidence as JSON values."""

    id: str
    decision: Decision = Decision.KEEP
    reason: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_line(self) -> dict[str, Any]:
        """Returns it as a JSON object."""
        return {"id": self.id, "decision": self.decision.value, "reason": self.reason, "details": dict(self.details)}

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> Finding:
        """Returns the finding that `to_line` wrote."""
        return cls(line["id"], Decision(line["decision"]), line["reason"], line["details"])


TRIVIAL = "trivial"
EASY_TO_HACK = "easy to hack"
UNDETERMINED = "undetermined"
UNJUDGEABLE = "tests that cannot be judged"


@dataclass(frozen=True)
class SampleCounts:
    """Verdicts of a prompt's samples. `failed` ones could not be judged and say nothing about the prompt, unless they
    are `unjudgeable`, too: then its tests are at fault.
    """

    correct: int = 0
    wrong: int = 0
    ungradable: int = 0
    failed: int = 0
    unjudgeable: int = 0

    @property
    def judged(self) -> int:
        """Samples with a verdict; one that offers nothing to grade has not passed."""
        return self.correct + self.wrong + self.ungradable


def decide_difficulty(
    question_id: str, counts: SampleCounts, *, min_judged: int, trivial_pass_rate: float | None
) -> Finding:
    """Returns the finding of difficulty, 1 - pass rate over the judged samples.

    Undecided when fewer than `min_judged` were judged; dropped when the pass rate reaches `trivial_pass_rate`, unless
    that is None, and when the tests are at fault.
    """
    details: dict[str, Any] = asdict(counts)
    if counts.unjudgeable:
        return Finding(question_id, Decision.DROP, UNJUDGEABLE, details)
    if counts.judged < max(1, min_judged):
        return Finding(question_id, Decision.UNDECIDED, UNDETERMINED, details)
    pass_rate = counts.correct / counts.judged
    details["difficulty"] = round(1 - pass_rate, 6)
    if trivial_pass_rate is not None and pass_rate >= trivial_pass_rate:
        return Finding(question_id, Decision.DROP, TRIVIAL, details)
    return Finding(question_id, details=details)


def decide_guessing(question_id: str, counts: SampleCounts, *, min_judged: int) -> Finding:
    """Returns the finding of guesses: dropped when any was right or the tests are at fault; undecided below
    `min_judged` judged ones.
    """
    details = asdict(counts)
    if counts.unjudgeable:
        return Finding(question_id, Decision.DROP, UNJUDGEABLE, details)
    if counts.correct:
        return Finding(question_id, Decision.DROP, EASY_TO_HACK, details)
    if counts.judged < max(1, min_judged):
        return Finding(question_id, Decision.UNDECIDED, UNDETERMINED, details)
    return Finding(question_id, details=details)


def least_judged(samples: int, share: float) -> int:
    """Returns how many of `samples` must be judged."""
    return min(samples, math.ceil(samples * share - 1e-9))


OVER_THE_CAP = "over the cap of its domain and difficulty"


@dataclass(frozen=True)
class Cell:
    """A domain and a bucket of difficulty, from 0."""

    domain: str
    bucket: int


@dataclass(frozen=True)
class Buckets:
    """Buckets of equal width over [0, top]; a difficulty on an edge belongs to the upper one, the top to the last."""

    count: int
    top: float = 1.0

    @classmethod
    def over(cls, questions: Iterable[Question], count: int) -> Buckets:
        """Returns buckets over the questions' difficulties; over [0, 1] when they fit there, as measured ones do."""
        return cls(count, max([1.0, *(question.difficulty or 0.0 for question in questions)]))

    def find(self, difficulty: float | None) -> int:
        """Returns the bucket; an unknown difficulty counts as 0."""
        return min(self.count - 1, max(0, int((difficulty or 0.0) / self.top * self.count)))

    def name(self, bucket: int) -> str:
        """Returns the bucket's range."""
        width = self.top / self.count
        return f"{bucket * width:.2g}-{(bucket + 1) * width:.2g}"


def balance(questions: Sequence[Question], buckets: Buckets, cap: int | None, seed: int) -> list[Finding]:
    """Returns a finding per prompt, in order: each cell keeps at most `cap` prompts, drawn by `seed`; None keeps all.

    A draw depends on the seed and the prompts' ids alone, so that the order of the input changes nothing.
    """
    cells: defaultdict[Cell, list[Question]] = defaultdict(list)
    for question in questions:
        cells[Cell(question.domain, buckets.find(question.difficulty))].append(question)
    dropped: set[str] = set()
    if cap is not None:
        for members in cells.values():
            members.sort(key=lambda question: _draw(seed, question.id))
            dropped.update(question.id for question in members[cap:])
    return [
        Finding(question.id, Decision.DROP, OVER_THE_CAP) if question.id in dropped else Finding(question.id)
        for question in questions
    ]


def count_cells(questions: Iterable[Question], buckets: Buckets) -> Counter[Cell]:
    """Returns the prompts per cell."""
    return Counter(Cell(question.domain, buckets.find(question.difficulty)) for question in questions)


def shares(counts: Mapping[Cell, int]) -> dict[str, float]:
    """Returns the share of each domain."""
    by_domain: Counter[str] = Counter()
    for cell, count in counts.items():
        by_domain[cell.domain] += count
    total = sum(by_domain.values())
    return {domain: by_domain[domain] / total for domain in sorted(by_domain)} if total else {}


def _draw(seed: int, question_id: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{question_id}".encode(), digest_size=16).digest()
