"""Balances a prompt set: at most so many prompts of one domain and one bucket of difficulty."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from perigee.curation.findings import Decision, Finding, Question

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
        """Buckets over the questions' difficulties; over [0, 1] when they fit there, as measured ones do."""
        return cls(count, max([1.0, *(question.difficulty or 0.0 for question in questions)]))

    def find(self, difficulty: float | None) -> int:
        """The bucket; an unknown difficulty counts as 0."""
        return min(self.count - 1, max(0, int((difficulty or 0.0) / self.top * self.count)))

    def name(self, bucket: int) -> str:
        """The bucket's range."""
        width = self.top / self.count
        return f"{bucket * width:.2g}-{(bucket + 1) * width:.2g}"


def balance(questions: Sequence[Question], buckets: Buckets, cap: int | None, seed: int) -> list[Finding]:
    """A finding per prompt, in order: each cell keeps at most `cap` prompts, drawn by `seed`; None keeps all.

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
    """Prompts per cell."""
    return Counter(Cell(question.domain, buckets.find(question.difficulty)) for question in questions)


def shares(counts: Mapping[Cell, int]) -> dict[str, float]:
    """The share of each domain."""
    by_domain: Counter[str] = Counter()
    for cell, count in counts.items():
        by_domain[cell.domain] += count
    total = sum(by_domain.values())
    return {domain: by_domain[domain] / total for domain in sorted(by_domain)} if total else {}


def _draw(seed: int, question_id: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{question_id}".encode(), digest_size=16).digest()
