"""Packed tokens, logprobs and version spans."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perigee.buffer.packing import (
    all_finite,
    count_tokens,
    pack_logprobs,
    pack_token_ids,
    unpack_logprobs,
    unpack_token_ids,
)
from perigee.buffer.v1 import buffer_pb2 as pb
from services.buffer.model import pack_spans, unpack_spans

tokens = st.lists(st.integers(0, 2**32 - 1))
logprobs = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False))
spans = st.lists(
    st.builds(pb.VersionSpan, policy_version=st.integers(0, 2**64 - 1), tokens=st.integers(0, 5)), max_size=20
)


def per_token(spans: list[pb.VersionSpan]) -> list[int]:
    return [span.policy_version for span in spans for _ in range(span.tokens)]


@given(tokens)
def test_tokens_come_back(token_ids: list[int]) -> None:
    packed = pack_token_ids(token_ids)
    assert list(unpack_token_ids(pb.Chunk(token_ids=packed).token_ids)) == token_ids
    assert packed == b"".join(token.to_bytes(4, "little") for token in token_ids)
    assert np.frombuffer(packed, dtype="<u4").tolist() == token_ids
    assert count_tokens(packed) == len(token_ids)


@given(logprobs)
def test_logprobs_come_back_to_the_bit(values: list[float]) -> None:
    packed = pack_logprobs(values)
    assert list(unpack_logprobs(pb.Chunk(logprobs=packed).logprobs)) == values
    assert np.frombuffer(packed, dtype="<f4").tolist() == values
    assert all_finite(packed)


@given(logprobs, st.sampled_from([float("nan"), float("inf"), float("-inf")]), st.integers(0, 100))
def test_one_bad_logprob_is_seen(values: list[float], bad: float, at: int) -> None:
    values.insert(at % (len(values) + 1), bad)
    assert not all_finite(pack_logprobs(values))


def test_the_largest_logprobs_are_finite_together() -> None:
    largest = float(np.finfo(np.float32).max)
    assert all_finite(pack_logprobs([largest] * 1000))


@pytest.mark.parametrize("token_id", [-1, 2**32])
def test_a_token_that_does_not_fit_is_refused(token_id: int) -> None:
    with pytest.raises(OverflowError):
        pack_token_ids([token_id])


@given(spans, st.integers(0, 2**31))
def test_spans_come_back(given_spans: list[pb.VersionSpan], offset: int) -> None:
    versions = per_token(given_spans)
    packed = pack_spans(given_spans, offset)
    assert per_token(unpack_spans(packed, offset, offset + len(versions))) == versions


@given(spans, st.integers(0, 30), st.integers(0, 30))
def test_any_window_of_spans_is_that_window_of_versions(
    given_spans: list[pb.VersionSpan], first: int, length: int
) -> None:
    versions = per_token(given_spans)
    window = unpack_spans(pack_spans(given_spans, 0), first, first + length)
    assert per_token(window) == versions[first : first + length]
    assert all(span.tokens > 0 for span in window)
