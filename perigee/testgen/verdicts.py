"""Which candidates become test cases, and whether the problem is kept: rules over results, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from perigee.testgen.agreement import find_agreement, needed
from perigee.testgen.comparison import Comparison
from perigee.testgen.plan import Plan

AGREES = "AGREES"
DIFFERS = "DIFFERS"


class Drop(StrEnum):
    """Why a problem is not kept."""

    NEEDS_CHECKER = "needs_checker"
    TOO_FEW_CASES = "too_few_cases"
    SOLUTIONS_DIFFER = "solutions_differ"


@dataclass(frozen=True)
class SolutionRun:
    """How a known solution ended on one input, and its output where it ended well."""

    status: str
    output: bytes | None = None


@dataclass(frozen=True)
class Case:
    """A candidate and what became of it."""

    name: str
    seed: int
    # Empty where the generator gave none.
    input_sha256: str = ""
    # Why it was dropped; empty where it was kept.
    dropped: str = ""
    expected: bytes = field(default=b"", repr=False)
    # By solution: AGREES, DIFFERS, or the status of a run that did not end well.
    results: Mapping[str, str] = field(default_factory=dict)

    @property
    def kept(self) -> bool:
        """Whether the candidate is a test case."""
        return not self.dropped


@dataclass(frozen=True)
class Verdict:
    """What is decided on a problem."""

    cases: Sequence[Case]
    # None where the problem is kept.
    drop: Drop | None
    reason: str
    # How many test cases each solution passes.
    passes: Mapping[str, int] = field(default_factory=dict)

    @property
    def kept(self) -> bool:
        """Whether the problem is kept."""
        return self.drop is None

    @property
    def test_cases(self) -> list[Case]:
        """The candidates that were kept."""
        return [case for case in self.cases if case.kept]


def judge_candidate(
    name: str, seed: int, input_sha256: str, runs: Mapping[str, SolutionRun], same: Comparison, plan: Plan
) -> Case:
    """Keeps an input when enough solutions agree on its output, which then is the expected one."""
    agreement = find_agreement([run.output for run in runs.values()], same)
    agreeing = {list(runs)[index] for index in agreement.members} if agreement else set()
    results = {
        solution: AGREES if solution in agreeing else DIFFERS if run.output is not None else run.status
        for solution, run in runs.items()
    }
    expected = agreement.output if agreement else b""
    dropped = ""
    if len(agreeing) < needed(plan.agree_share, len(runs)):
        dropped = f"{len(agreeing)} of {len(runs)} solutions agree, {needed(plan.agree_share, len(runs))} must"
    elif not expected.strip():
        dropped = "the solutions agree on an empty output"
    return Case(name, seed, input_sha256, dropped, expected, results)


def judge_problem(cases: Sequence[Case], solutions: Sequence[str], plan: Plan) -> Verdict:
    """Keeps the problem when enough cases are left and enough solutions pass them all."""
    kept = [case for case in cases if case.kept]
    passed = Counter(solution for case in kept for solution, result in case.results.items() if result == AGREES)
    passes = {solution: passed[solution] for solution in solutions}
    if len(kept) < plan.minimum:
        reason = f"{len(kept)} of {len(cases)} candidates are valid cases, {plan.minimum} must be"
        return Verdict(cases, Drop.TOO_FEW_CASES, reason, passes)
    passing = sum(count == len(kept) for count in passes.values())
    must = needed(plan.pass_share, len(solutions))
    reason = f"{passing} of {len(solutions)} solutions pass all {len(kept)} cases"
    if passing < must:
        return Verdict(cases, Drop.SOLUTIONS_DIFFER, f"{reason}, {must} must", passes)
    return Verdict(cases, None, reason, passes)


def drop_duplicates(inputs: Mapping[str, str]) -> dict[str, str]:
    """The inputs that came before, by the candidate that repeats one; `inputs` are digests by candidate, in order."""
    first: dict[str, str] = {}
    return {name: first[digest] for name, digest in inputs.items() if first.setdefault(digest, name) != name}
