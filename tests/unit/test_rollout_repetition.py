"""The repetition detector against a plain definition of what it looks for."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perigee.rollout.v1.rollout_pb2 import RepetitionStop
from services.rollout.repetition import RepetitionDetector


def first_repetition(tokens: Sequence[int], stop: RepetitionStop) -> int | None:
    """The shortest prefix whose tail is a pattern of a period up to the limit, repeated often enough."""
    for length in range(1, len(tokens) + 1):
        for period in range(1, stop.max_period + 1):
            size = period * stop.min_repeats
            tail = list(tokens[length - size : length]) if size <= length else []
            if tail and tail == tail[:period] * stop.min_repeats:
                return length
    return None


STOPS = st.builds(RepetitionStop, max_period=st.integers(1, 6), min_repeats=st.integers(2, 4))
# Few symbols, so that repetitions are common.
TOKENS = st.lists(st.integers(0, 2), max_size=60)


@given(tokens=TOKENS, stop=STOPS, data=st.data())
def test_finds_the_first_repetition_whatever_the_pieces(
    tokens: list[int], stop: RepetitionStop, data: st.DataObject
) -> None:
    detector = RepetitionDetector(stop)
    found, start = None, 0
    while start < len(tokens) and found is None:
        size = data.draw(st.integers(1, len(tokens) - start))
        cut = detector.feed(tokens[start : start + size])
        found = None if cut is None else start + cut
        start += size
    assert found == first_repetition(tokens, stop)


@given(tokens=TOKENS, stop=STOPS)
def test_a_resumed_response_needs_only_its_window(tokens: list[int], stop: RepetitionStop) -> None:
    found = first_repetition(tokens, stop)
    for split in range(len(tokens)):
        if found is not None and split >= found:
            break
        detector = RepetitionDetector(stop)
        assert detector.feed(tokens[:split][-stop.max_period * stop.min_repeats :]) is None
        cut = detector.feed(tokens[split:])
        assert (None if cut is None else split + cut) == found


def test_a_pattern_that_spans_segments_is_seen() -> None:
    pattern = list(range(20))
    detector = RepetitionDetector(RepetitionStop(max_period=32, min_repeats=3))
    assert detector.feed(pattern * 2) is None
    assert detector.feed(pattern) == 20


@pytest.mark.parametrize("size", [511, 512, 513, 2000])
def test_pieces_longer_than_a_block(size: int) -> None:
    tokens = [i * i % 7919 for i in range(size)] + [1, 2, 3] * 4
    detector = RepetitionDetector(RepetitionStop(max_period=64, min_repeats=4))
    assert detector.feed(tokens) == len(tokens)
