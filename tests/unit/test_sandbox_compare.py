"""Comparison of outputs and of JSON values."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.sandbox.compare import same_json, same_json_text, same_tokens

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(JSON)
def test_a_value_equals_itself_through_json(value: Any) -> None:
    assert same_json_text(json.dumps(value).encode(), value)


@given(JSON, JSON)
def test_comparison_is_symmetric_and_agrees_with_equality(left: Any, right: Any) -> None:
    assert same_json(left, right) == same_json(right, left)
    if same_json(left, right) and "NaN" not in json.dumps([left, right]):
        assert left == right


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        (1, 1.0, True),
        (True, 1, False),
        (0, False, False),
        (None, 0, False),
        ("1", 1, False),
        ([1, [True]], [1, [1]], False),
        ({"a": 1}, {"a": 1.0}, True),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ([], {}, False),
        ([1, 2], [1], False),
        ([1], [1, 2], False),
        (2**70, 2**70, True),
        (2**70 + 1, 2**70, False),
        (float("nan"), float("nan"), True),
        (0.1 + 0.2, 0.3, False),
    ],
)
def test_json_pairs(left: Any, right: Any, same: bool) -> None:
    assert same_json(left, right) is same


@pytest.mark.parametrize("text", [b"", b"{", b"nul", b"[" * 100_000, b"\xff"])
def test_text_that_is_not_json_is_not_the_value(text: bytes) -> None:
    assert not same_json_text(text, None)


@pytest.mark.parametrize(
    ("actual", "expected", "same"),
    [
        (b" 1  2\n", b"1 2", True),
        (b"1 2", b"12", False),
        (b"1", b"1 2", False),
        (b"1 2 3", b"1 2", False),
        (b"", b"\n", True),
        (b"\xff", b"\xff", True),
    ],
)
def test_tokens(actual: bytes, expected: bytes, same: bool) -> None:
    assert same_tokens(actual, expected) is same
