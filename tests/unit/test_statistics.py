"""95% intervals and paired tests: against published values, and their coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perigee.statistics import clustered_interval, majority, mcnemar, paired_bootstrap, wilson_interval


def test_wilson_against_known_values() -> None:
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    for correct, total, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]:
        interval = wilson_interval(correct, total)
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)


def test_one_answer_per_problem_is_close_to_wilson() -> None:
    answers = [[n < 120] for n in range(300)]
    clustered, plain = clustered_interval(answers), wilson_interval(120, 300)
    assert (clustered.mean, clustered.low, clustered.high) == pytest.approx(
        (plain.mean, plain.low, plain.high), abs=2e-3
    )


def test_answers_that_agree_within_problems_add_no_certainty() -> None:
    single = clustered_interval([[n < 120] for n in range(300)])
    four_times = clustered_interval([[n < 120] * 4 for n in range(300)])
    assert (four_times.low, four_times.high) == pytest.approx((single.low, single.high))


def test_coverage_with_difficulties_that_differ() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        chance_P = generator.beta(0.5, 0.7, size=128)
        answers = generator.random((128, 4)) < chance_P[:, None]
        interval = clustered_interval(answers.tolist())
        covered += interval.low <= 0.5 / 1.2 <= interval.high
    assert 0.92 <= covered / 400 <= 0.98


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), max_size=4), max_size=20))
def test_an_interval_holds_its_mean(answers: list[list[bool]]) -> None:
    interval = clustered_interval(answers)
    if not any(answers):
        assert math.isnan(interval.mean)
    else:
        assert 0.0 <= interval.low <= interval.mean <= interval.high <= 1.0


def test_mcnemar_is_the_exact_binomial_test() -> None:
    # Fleiss, Levin and Paik (2003), chapter 13: the tail of a binomial at one half.
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(1, 9) == mcnemar(9, 1) == pytest.approx(2 * 11 / 1024)
    assert mcnemar(5, 5) == 1.0


def test_bootstrap_finds_a_difference_only_where_there_is_one() -> None:
    found, p = paired_bootstrap([0.5] * 30 + [0.0] * 70)
    assert found.mean == pytest.approx(0.15)
    assert 0 < found.low < found.mean < found.high
    assert p < 0.001
    none, p = paired_bootstrap([0.5, -0.5] * 50)
    assert none.low < 0 < none.high
    assert p > 0.5
    with pytest.raises(ValueError, match="no problem"):
        paired_bootstrap([])


def test_the_most_frequent_answer_wins() -> None:
    assert majority([("4", True), ("5", False), ("4", True)])
    assert not majority([("5", False), ("4", True)])
    assert not majority([("", False), ("", False)])
    assert majority([("", False), ("", False), ("4", True)])
