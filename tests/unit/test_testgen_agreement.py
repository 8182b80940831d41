"""Which output solutions agree on."""

from collections import Counter
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from perigee.sandbox.compare import Comparison, Tolerance
from perigee.testgen.plan import compare_by
from perigee.testgen.selection import Agreement, find_agreement, needed

same_tokens = compare_by(Comparison.TOKENS)
same_bytes = compare_by(Comparison.EXACT)

outputs = st.lists(st.sampled_from([None, b"1", b"2", b"3 ", b"3"]), max_size=12)


def test_the_most_frequent_output_wins() -> None:
    assert find_agreement([b"1", b"2", None, b"2 ", b"2"], same_tokens) == Agreement(b"2", (1, 3, 4))


def test_at_a_tie_the_earliest_wins() -> None:
    assert find_agreement([b"2", b"1", b"1", b"2"], same_bytes) == Agreement(b"2", (0, 3))


def test_failures_agree_on_nothing() -> None:
    assert find_agreement([None, None, None], same_bytes) is None
    assert find_agreement([], same_bytes) is None


def test_within_a_tolerance_the_output_in_the_middle_wins() -> None:
    agreement = find_agreement([b"0.0", b"1.0", b"2.0"], compare_by(Tolerance(1, 0)))
    assert agreement == Agreement(b"1.0", (0, 1, 2))


@given(outputs)
def test_byte_agreement_is_the_largest_count(found: list[bytes | None]) -> None:
    agreement = find_agreement(found, same_bytes)
    counts = Counter(output for output in found if output is not None)
    if not counts:
        assert agreement is None
    else:
        assert agreement is not None
        assert len(agreement.members) == max(counts.values()) == counts[agreement.output]
        assert all(found[index] == agreement.output for index in agreement.members)


@given(outputs, st.randoms(use_true_random=False))
def test_how_many_agree_does_not_depend_on_the_order(found: list[bytes | None], random: object) -> None:
    shuffled = list(found)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    first, second = (
        find_agreement(found, same_tokens),
        find_agreement(shuffled, same_tokens),
    )
    assert (first and len(first.members)) == (second and len(second.members))


@given(st.integers(1, 1000), st.integers(1, 100))
def test_needed_is_the_smallest_count_with_the_fraction(count: int, percent: int) -> None:
    fraction = Fraction(percent, 100)
    least = needed(fraction, count)
    assert Fraction(least, count) >= fraction > Fraction(least - 1, count)


def test_the_reports_fractions() -> None:
    assert needed(Fraction("0.7"), 10) == 7
    assert needed(Fraction("0.9"), 10) == 9
    assert needed(Fraction("0.55"), 100) == 55  # which 0.55 * 100 as a float is not
