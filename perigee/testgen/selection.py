"""Selection of test cases: pure rules that decide which candidates are kept, and whether the problem is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from fractions import Fraction

from perigee.testgen.plan import Plan, SameOutput


@dataclass(frozen=True)
class Agreement:
    """Output on which most agree, and the indices of the outputs that are the same."""

    output: bytes
    members: tuple[int, ...]


def find_agreement(outputs: Sequence[bytes | None], same: SameOutput) -> Agreement | None:
    """Finds the output with the most others that are the same, the earliest at a tie; None when there is no output.

    Within tolerances sameness is not transitive, so each output in turn is tried as the expected one. A solution
    without an output, None, agrees with none.
    """
    best: Agreement | None = None
    for expected in dict.fromkeys(outputs):
        if expected is None:
            continue
        # equal bytes are compared once
        equal = {output: same(output, expected) for output in dict.fromkeys(outputs) if output is not None}
        members = tuple(index for index, output in enumerate(outputs) if output is not None and equal[output])
        if best is None or len(members) > len(best.members):
            best = Agreement(expected, members)
    return best


def needed(fraction: Fraction, count: int) -> int:
    """Returns how many of `count` make up at least `fraction` of them."""
    return math.ceil(fraction * count)


AGREES = "AGREES"
DIFFERS = "DIFFERS"


class Drop(StrEnum):
    """Reason why a problem is dropped."""

    NEEDS_CHECKER = "needs_checker"
    TOO_FEW_CASES = "too_few_cases"
    SOLUTIONS_DIFFER = "solutions_differ"


@dataclass(frozen=True)
class SolutionRun:
    """Run of a known solution on one input, with its output if the status is OK."""

    status: str
    output: bytes | None = None


@dataclass(frozen=True)
class Case:
    """Candidate, kept as a test case or dropped."""

    name: str
    seed: int
    # Empty when the generator gave none.
    input_sha256: str = ""
    # Why it was dropped; empty when it was kept.
    dropped: str = ""
    expected: bytes = field(default=b"", repr=False)
    # By solution: AGREES, DIFFERS, or the status of a run that did not end well.
    results: Mapping[str, str] = field(default_factory=dict)

    @property
    def kept(self) -> bool:
        """Whether the candidate is a test case."""
        return not self.dropped


@dataclass(frozen=True)
class Selection:
    """Selection of a problem's test cases."""

    cases: Sequence[Case]
    # None when the problem is kept.
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
        """Candidates that were kept."""
        return [case for case in self.cases if case.kept]


def select_case(
    name: str, seed: int, input_sha256: str, runs: Mapping[str, SolutionRun], same: SameOutput, plan: Plan
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
    if len(agreeing) < needed(plan.agree_fraction, len(runs)):
        dropped = f"{len(agreeing)} of {len(runs)} solutions agree, {needed(plan.agree_fraction, len(runs))} must"
    elif not expected.strip():
        dropped = "the solutions agree on an empty output"
    return Case(name, seed, input_sha256, dropped, expected, results)


def select_problem(cases: Sequence[Case], solutions: Sequence[str], plan: Plan) -> Selection:
    """Keeps the problem when enough cases are left and enough solutions pass them all."""
    kept = [case for case in cases if case.kept]
    passed = Counter(solution for case in kept for solution, result in case.results.items() if result == AGREES)
    passes = {solution: passed[solution] for solution in solutions}
    if len(kept) < plan.minimum:
        reason = f"{len(kept)} of {len(cases)} candidates are valid cases, {plan.minimum} must be"
        return Selection(cases, Drop.TOO_FEW_CASES, reason, passes)
    passing = sum(count == len(kept) for count in passes.values())
    must = needed(plan.pass_fraction, len(solutions))
    reason = f"{passing} of {len(solutions)} solutions pass all {len(kept)} cases"
    if passing < must:
        return Selection(cases, Drop.SOLUTIONS_DIFFER, f"{reason}, {must} must", passes)
    return Selection(cases, None, reason, passes)


def drop_duplicates(inputs: Mapping[str, str]) -> dict[str, str]:
    """Returns the first candidate with the same input, by the candidate that repeats it."""
    first: dict[str, str] = {}
    return {name: first[digest] for name, digest in inputs.items() if first.setdefault(digest, name) != name}
