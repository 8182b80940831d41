"""When outputs count as the same."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perigee.sandbox.compare import Comparison, Tolerance
from perigee.testgen.plan import SameOutput, compare_by

same_lines = compare_by(Comparison.LINES)
same_tokens = compare_by(Comparison.TOKENS)
same_bytes = compare_by(Comparison.EXACT)
same_unordered_lines = compare_by(Comparison.UNORDERED_LINES)
same_unordered_tokens = compare_by(Comparison.UNORDERED_TOKENS)

EQUIVALENCES = [
    same_bytes,
    same_tokens,
    same_lines,
    same_unordered_lines,
    same_unordered_tokens,
]
outputs = st.lists(st.sampled_from([b"1", b"2", b"a", b" ", b"\n", b"\r\n", b"\t"]), max_size=8).map(b"".join)


@pytest.mark.parametrize(
    ("same", "actual", "expected", "verdict"),
    [
        (same_bytes, b"1\n", b"1\n", True),
        (same_bytes, b"1", b"1\n", False),
        (same_tokens, b" 1\r\n2 ", b"1 2", True),
        (same_tokens, b"12", b"1 2", False),
        (same_lines, b"a b \r\nc\n\n\n", b"a b\nc", True),
        (same_lines, b"a  b", b"a b", False),
        (same_lines, b" a", b"a", False),
        (same_lines, b"a\n\nb", b"a\nb", False),
        (same_unordered_lines, b"b 1\na\n", b"a\nb 1", True),
        (same_unordered_lines, b"a\na\nb", b"a\nb\nb", False),
        (same_unordered_lines, b"1 b\na", b"a\nb 1", False),
        (same_unordered_tokens, b"1 b\na", b"a\nb 1", True),
        (same_unordered_tokens, b"1 1 2", b"1 2 2", False),
        (compare_by(Tolerance(0.01, 0)), b"x 1.009", b"x 1", True),
        (compare_by(Tolerance(0.01, 0)), b"x 1.011", b"x 1", False),
        (compare_by(Tolerance(0.01, 0)), b"y 1", b"x 1", False),
        (compare_by(Tolerance(0.01, 0)), b"1", b"1 1", False),
        (compare_by(Tolerance(0, 0.1)), b"1.0e2", b"+110", True),
        (compare_by(Tolerance(0, 0.1)), b"98", b"110", False),
        (compare_by(Tolerance(1, 1)), b"nan", b"1", False),
        (compare_by(Tolerance(1, 1)), b"NaN inf", b"nan Infinity", True),
        (compare_by(Tolerance(1, 1)), b"-inf", b"inf", False),
        (compare_by(Tolerance(1, 1)), b"1_0", b"10", False),
        (compare_by(Tolerance(1, 1)), b"0x10", b"16", False),
    ],
)
def test_examples(same: SameOutput, actual: bytes, expected: bytes, verdict: bool) -> None:
    assert same(actual, expected) is verdict


@given(st.sampled_from(EQUIVALENCES), outputs, outputs, outputs)
def test_equivalence(same: SameOutput, a: bytes, b: bytes, c: bytes) -> None:
    assert same(a, a)
    assert same(a, b) is same(b, a)
    if same(a, b) and same(b, c):
        assert same(a, c)


@given(outputs, outputs)
def test_stricter_comparisons_accept_no_more(a: bytes, b: bytes) -> None:
    order = [
        same_bytes,
        same_lines,
        same_tokens,
        same_unordered_tokens,
    ]
    verdicts = [same(a, b) for same in order]
    assert verdicts == sorted(verdicts)
    assert same_unordered_lines(a, b) <= same_unordered_tokens(a, b)


@given(st.floats(), st.floats(0, 1e6))
def test_a_number_is_near_itself_however_it_is_written(number: float, tolerance: float) -> None:
    same = compare_by(Tolerance(tolerance, 0))
    assert same(repr(number).encode(), f"{number:.17e}".encode())
