"""Packed tokens, logprobs and version spans."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from perigee.buffer.v1 import buffer_pb2 as pb
from services.buffer.packing import (
    are_finite,
    pack_logprobs,
    pack_spans,
    pack_tokens,
    unpack_logprobs,
    unpack_spans,
    unpack_tokens,
)
from services.buffer.types import EndReason, Outcome, Span, Verdict

tokens = st.lists(st.integers(0, 2**32 - 1))
logprobs = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False))
spans = st.lists(st.builds(Span, st.integers(0, 2**64 - 1), st.integers(0, 5)))


def per_token(spans: list[Span]) -> list[int]:
    return [span.policy_version for span in spans for _ in range(span.tokens)]


@given(tokens)
def test_tokens_come_back(token_ids: list[int]) -> None:
    packed = pack_tokens(pb.Chunk(token_ids=token_ids).token_ids)
    assert unpack_tokens(packed).tolist() == token_ids
    assert packed == b"".join(token.to_bytes(4, "little") for token in token_ids)


@given(logprobs)
def test_logprobs_come_back_to_the_bit(values: list[float]) -> None:
    packed = pack_logprobs(pb.Chunk(logprobs=values).logprobs)
    assert unpack_logprobs(packed).tolist() == values
    assert are_finite(packed)


@given(logprobs, st.sampled_from([float("nan"), float("inf"), float("-inf")]), st.integers(0, 100))
def test_one_bad_logprob_is_seen(values: list[float], bad: float, at: int) -> None:
    values.insert(at % (len(values) + 1), bad)
    assert not are_finite(pack_logprobs(np.array(values, dtype=np.float32).tolist()))


@given(spans, st.integers(0, 2**31))
def test_spans_come_back(given_spans: list[Span], offset: int) -> None:
    versions = per_token(given_spans)
    packed = pack_spans(given_spans, offset)
    assert per_token(unpack_spans(packed, offset, offset + len(versions))) == versions


@given(spans, st.integers(0, 30), st.integers(0, 30))
def test_any_window_of_spans_is_that_window_of_versions(given_spans: list[Span], first: int, length: int) -> None:
    versions = per_token(given_spans)
    window = unpack_spans(pack_spans(given_spans, 0), first, first + length)
    assert per_token(window) == versions[first : first + length]
    assert all(span.tokens > 0 for span in window)


def test_enumerations_have_the_numbers_of_the_protocol() -> None:
    assert {item.name: item.value for item in EndReason if item} == {
        name.removeprefix("END_REASON_"): number for name, number in pb.EndReason.items() if number
    }
    assert {item.name: item.value for item in Outcome} == {
        name.removeprefix("APPEND_OUTCOME_"): number for name, number in pb.AppendOutcome.items() if number
    }
    assert {item.name: item.value for item in Verdict} == {
        name.removeprefix("VERDICT_"): number for name, number in pb.Verdict.items()
    }
