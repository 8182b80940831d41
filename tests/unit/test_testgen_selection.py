"""Which candidates become test cases, and whether the problem is kept."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perigee.errors import InvalidArgumentError
from perigee.sandbox.compare import Comparison
from perigee.testgen.plan import Plan, candidate_seed, compare_by, digest
from perigee.testgen.selection import (
    AGREES,
    DIFFERS,
    Case,
    Drop,
    SolutionRun,
    drop_duplicates,
    select_case,
    select_problem,
)

PLAN = Plan(candidates=5, minimum=4)
NAMES = [f"known/{letter}.py" for letter in "abcdefghij"]


def judge(outputs: Sequence[bytes | str], plan: Plan = PLAN) -> Case:
    """A case of ten solutions: an output, or the status of a run without one."""
    runs = {
        name: SolutionRun("OK", output) if isinstance(output, bytes) else SolutionRun(output)
        for name, output in zip(NAMES, outputs, strict=True)
    }
    return select_case("001", 7, "input", runs, compare_by(Comparison.TOKENS), plan)


def test_seven_of_ten_make_a_case() -> None:
    case = judge([b"4"] * 7 + [b"5", "TIME_LIMIT", "RUNTIME_ERROR"])
    assert case.kept
    assert case.expected == b"4"
    assert list(case.results.values()) == [AGREES] * 7 + [DIFFERS, "TIME_LIMIT", "RUNTIME_ERROR"]


def test_six_of_ten_do_not() -> None:
    case = judge([b"4"] * 6 + [b"5"] * 4)
    assert case.dropped == "6 of 10 solutions agree, 7 must"


def test_agreement_on_failing_makes_no_case() -> None:
    assert judge(["TIME_LIMIT"] * 10).dropped == "0 of 10 solutions agree, 7 must"


def test_agreement_on_nothing_makes_no_case() -> None:
    assert judge([b"\n"] * 10).dropped == "the solutions agree on an empty output"


def cases_of(*wrong: int, dropped: int = 0) -> list[Case]:
    """Five cases that the first solutions fail, so many for each number, after `dropped` that are no cases."""
    results = [
        {name: DIFFERS if position < wrong[index] else AGREES for position, name in enumerate(NAMES)}
        for index in range(5)
    ]
    return [
        Case(f"{index + 1:03}", 0, "x", "no" if index < dropped else "", b"1", results[index]) for index in range(5)
    ]


@pytest.mark.parametrize(
    ("cases", "drop", "reason"),
    [
        (cases_of(1, 0, 1, 1, 1), None, "9 of 10 solutions pass all 5 cases"),
        (cases_of(1, 2, 1, 1, 1), Drop.SOLUTIONS_DIFFER, "8 of 10 solutions pass all 5 cases, 9 must"),
        (cases_of(2, 1, 1, 1, 1, dropped=1), None, "9 of 10 solutions pass all 4 cases"),
        (cases_of(0, 0, 0, 0, 0, dropped=2), Drop.TOO_FEW_CASES, "3 of 5 candidates are valid cases, 4 must be"),
    ],
)
def test_nine_of_ten_keep_a_problem(cases: list[Case], drop: Drop | None, reason: str) -> None:
    verdict = select_problem(cases, NAMES, PLAN)
    assert (verdict.drop, verdict.reason) == (drop, reason)


def test_passes_count_kept_cases_alone() -> None:
    passes = select_problem(cases_of(3, 1, 0, 0, 0, dropped=1), NAMES, PLAN).passes
    assert [passes[name] for name in NAMES] == [3, *[4] * 9]


@given(
    st.lists(st.lists(st.sampled_from([b"1", b"2", "TIME_LIMIT"]), min_size=10, max_size=10), min_size=5, max_size=5),
    st.integers(51, 100),
    st.integers(51, 100),
)
def test_asking_for_more_agreement_keeps_no_more(
    outputs: list[list[bytes | str]], one_percent: int, other_percent: int
) -> None:
    low, high = (
        replace(PLAN, agree_fraction=Fraction(percent, 100)) for percent in sorted([one_percent, other_percent])
    )
    kept_low = [judge(row, low).kept for row in outputs]
    kept_high = [judge(row, high).kept for row in outputs]
    assert all(low_one >= high_one for low_one, high_one in zip(kept_low, kept_high, strict=True))


def test_of_equal_inputs_the_first_stays() -> None:
    assert drop_duplicates({"001": "a", "002": "b", "003": "a", "004": "a"}) == {"003": "001", "004": "001"}


def test_seeds_are_fixed_and_apart() -> None:
    seeds = [candidate_seed(0, index) for index in range(1, 1001)]
    assert seeds[:2] == [4289200780, 828573510]
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert candidate_seed(1, 1) != seeds[0]


@given(st.lists(st.binary(max_size=3), max_size=4), st.lists(st.binary(max_size=3), max_size=4))
def test_digests_tell_lists_of_parts_apart(one: list[bytes], other: list[bytes]) -> None:
    assert (digest(*one) == digest(*other)) is (one == other)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(candidates=10), "--minimum: must be from 1 to --candidates, 10"),
        (Plan(agree_fraction=Fraction(1, 2)), "--agree-fraction: must be above 0.5"),
        (Plan(pass_fraction=Fraction(3, 2)), "--pass-fraction: must be above 0"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(plan: Plan, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        plan.check()
