"""Domains, pass rates, guesses and balance."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perigee.curation.domains import find_domains, tag
from perigee.curation.findings import (
    EASY_TO_HACK,
    OVER_THE_CAP,
    TRIVIAL,
    UNDETERMINED,
    UNJUDGEABLE,
    Buckets,
    Cell,
    Decision,
    Finding,
    Question,
    SampleCounts,
    balance,
    count_cells,
    decide_difficulty,
    decide_guessing,
    least_judged,
    shares,
)


@pytest.mark.parametrize(
    ("text", "domain"),
    [
        (r"Evaluate $\int_0^1 x^2\,dx$.", "calculus"),
        (r"Find the eigenvalues of the matrix $\begin{pmatrix}1&2\\3&4\end{pmatrix}$.", "linear-algebra"),
        ("Two dice are rolled. What is the probability that the sum is 7?", "probability"),
        ("What is the remainder when 2^100 is divided by 7?", "number-theory"),
        ("In how many ways can 5 people be seated around a round table?", "combinatorics"),
        ("A triangle has sides 3, 4 and 5. Find its area.", "geometry"),
        (r"Solve the quadratic equation $x^2 - 5x + 6 = 0$.", "algebra"),
        ("A 2 kg block is pushed with a force of 10 newtons. What is its acceleration?", "physics"),
        ("How many moles of NaCl are in 58 g?", "chemistry"),
        ("Which enzyme copies DNA in the cell's nucleus?", "biology"),
        ("On an island, A says that B always lies. Knights and knaves live there. Who is the knave?", "logic"),
        ("Tom buys 3 pens for 2 dollars each. How much does he pay in total?", "arithmetic"),
        ("((4+5)*3)-6=", "arithmetic"),
        ("What is the median of the data set 3, 9, 4?", "statistics"),
        ("Give the answer.", "math"),
    ],
)
def test_words_and_latex_tell_the_domain(text: str, domain: str) -> None:
    assert tag(Question("q", text, "math"))[0] == domain


def test_a_tag_stays_and_a_program_is_code() -> None:
    questions = [
        Question("a", "A triangle.", "math", domain="olympiad"),
        Question("b", "Find the area of a triangle.", "code", domain="default"),
        Question("c", "Who wrote Faust?", "short_answer"),
    ]
    assert [finding.details["domain"] for finding in find_domains(questions)] == ["olympiad", "code", "general"]


def decide(counts: SampleCounts, trivial: float | None = 1.0) -> Finding:
    return decide_difficulty("q", counts, min_judged=8, trivial_pass_rate=trivial)


def test_difficulty_is_one_minus_the_pass_rate() -> None:
    finding = decide(SampleCounts(correct=3, wrong=6, ungradable=1))
    counts = {"correct": 3, "wrong": 6, "ungradable": 1, "failed": 0, "unjudgeable": 0}
    assert finding == Finding("q", details={**counts, "difficulty": 0.7})


def test_what_could_not_be_judged_is_not_wrong() -> None:
    assert decide(SampleCounts(correct=4, wrong=4, failed=2)).details["difficulty"] == 0.5
    undecided = decide(SampleCounts(correct=4, wrong=3, failed=3))
    assert (undecided.decision, undecided.reason) == (Decision.UNDECIDED, UNDETERMINED)
    assert "difficulty" not in undecided.details
    assert decide_difficulty("q", SampleCounts(failed=10), min_judged=0, trivial_pass_rate=1.0).reason == UNDETERMINED


def test_a_prompt_whose_tests_are_at_fault_goes() -> None:
    for counts in (SampleCounts(wrong=9, failed=1, unjudgeable=1), SampleCounts(failed=10, unjudgeable=10)):
        for finding in (decide(counts), decide_guessing("q", counts, min_judged=8)):
            assert (finding.decision, finding.reason) == (Decision.DROP, UNJUDGEABLE)


def test_trivial_prompts_go_when_they_are_to() -> None:
    solved = SampleCounts(correct=10)
    assert (decide(solved).decision, decide(solved).reason) == (Decision.DROP, TRIVIAL)
    assert decide(solved, None).decision is Decision.KEEP
    assert decide(SampleCounts(correct=9, wrong=1)).decision is Decision.KEEP
    assert decide(SampleCounts(correct=9, wrong=1), 0.9).reason == TRIVIAL
    assert decide(SampleCounts(wrong=10)).details["difficulty"] == 1.0


@pytest.mark.parametrize(
    ("counts", "decision", "reason"),
    [
        (SampleCounts(correct=1, wrong=7), Decision.DROP, EASY_TO_HACK),
        # One right guess is enough, whatever became of the others.
        (SampleCounts(correct=1, failed=7), Decision.DROP, EASY_TO_HACK),
        (SampleCounts(wrong=5, ungradable=3), Decision.KEEP, ""),
        (SampleCounts(wrong=6, failed=2), Decision.UNDECIDED, UNDETERMINED),
        (SampleCounts(failed=8), Decision.UNDECIDED, UNDETERMINED),
    ],
)
def test_a_right_guess_drops_a_prompt(counts: SampleCounts, decision: Decision, reason: str) -> None:
    finding = decide_guessing("q", counts, min_judged=7)
    assert (finding.decision, finding.reason) == (decision, reason)
    assert finding.details == asdict(counts)


@pytest.mark.parametrize(("samples", "share", "least"), [(10, 0.8, 8), (10, 0.71, 8), (8, 1.0, 8), (10, 0.7, 7)])
def test_how_many_must_be_judged(samples: int, share: float, least: int) -> None:
    assert least_judged(samples, share) == least


def test_findings_read_back() -> None:
    finding = decide(SampleCounts(correct=10))
    assert Finding.from_line(finding.to_line()) == finding


questions = st.lists(
    st.builds(
        lambda number, domain, difficulty: Question(f"q{number}", "text", "math", "", domain, difficulty),
        st.integers(0, 10_000), st.sampled_from(["a", "b"]), st.floats(0, 1) | st.none(),
    ),
    max_size=60,
    unique_by=lambda question: question.id,
)  # fmt: skip


@settings(deadline=None)
@given(questions, st.integers(1, 6), st.integers(1, 5), st.integers(0, 3))
def test_a_cell_keeps_its_cap_and_no_less(found: list[Question], cap: int, count: int, seed: int) -> None:
    buckets = Buckets.over(found, count)
    kept = {finding.id for finding in balance(found, buckets, cap, seed) if finding.decision is Decision.KEEP}
    before = count_cells(found, buckets)
    after = count_cells([question for question in found if question.id in kept], buckets)
    assert after == Counter({cell: min(cap, size) for cell, size in before.items()})
    # The order of the input changes nothing.
    turned = {finding.id for finding in balance(found[::-1], buckets, cap, seed) if finding.decision is Decision.KEEP}
    assert turned == kept


def test_the_seed_draws() -> None:
    found = [Question(str(i), "text", "math", domain="a") for i in range(40)]
    draws = {
        tuple(finding.id for finding in balance(found, Buckets(5), 10, seed) if finding.decision is Decision.KEEP)
        for seed in range(5)
    }
    assert len(draws) == 5
    dropped = [finding for finding in balance(found, Buckets(5), 10, 0) if finding.decision is Decision.DROP]
    assert {finding.reason for finding in dropped} == {OVER_THE_CAP}
    assert all(finding.decision is Decision.KEEP for finding in balance(found, Buckets(5), None, 0))


def test_buckets() -> None:
    five = Buckets(5)
    assert [five.find(value) for value in (None, 0.0, 0.19, 0.2, 0.99, 1.0)] == [0, 0, 0, 1, 4, 4]
    assert [five.name(bucket) for bucket in (0, 4)] == ["0-0.2", "0.8-1"]
    wide = Buckets.over([Question("a", "", "math", difficulty=8.0), Question("b", "", "math")], 4)
    assert [wide.find(value) for value in (0.0, 2.0, 7.9, 8.0)] == [0, 1, 3, 3]
    assert shares(Counter({Cell("a", 0): 1, Cell("a", 1): 2, Cell("b", 0): 1})) == {"a": 0.75, "b": 0.25}
    assert shares({}) == {}
