"""Segments over an engine whose tokens are known: budgets, chunks, repetition, versions."""

import itertools
from collections.abc import AsyncGenerator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perigee.buffer.packing import pack_token_ids, unpack_logprobs, unpack_token_ids
from perigee.buffer.v1 import buffer_pb2
from perigee.buffer.v1.buffer_pb2 import VersionSpan
from perigee.rollout.v1 import rollout_pb2 as pb
from perigee.rollout.v1.rollout_pb2 import RepetitionStop, Sampling
from perigee.rpc import MAX_MESSAGE_BYTES
from services.rollout.engine import Engine, EngineOutput, EngineRequest, RequestAbortedError
from services.rollout.extend import pack_results
from services.rollout.segment import (
    MAX_TEXT_BYTES,
    EndReason,
    Segment,
    SegmentSettings,
    bound_text,
    generate_segment,
    plan_end,
    slice_spans,
)
from tests.fixtures.rollout_engine import FragileEngine

STOP = buffer_pb2.END_REASON_STOP
REPETITION = buffer_pb2.END_REASON_REPETITION
MAX_RESPONSE_TOKENS = buffer_pb2.END_REASON_MAX_RESPONSE_TOKENS
BUDGET = buffer_pb2.END_REASON_BUDGET


def span(version: int, tokens: int) -> VersionSpan:
    return VersionSpan(policy_version=version, tokens=tokens)


class ScriptedEngine(FragileEngine):
    """Hands out given tokens, one version for the first `switch` of them and the next for the others."""

    def __init__(self, tokens: Sequence[int], stop: int, switch: int = 1 << 30) -> None:
        super().__init__()
        self.tokens, self.stop_token, self.switch = tokens, stop, switch
        self.requests: list[EngineRequest] = []
        self.handed_out = 0

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        self.requests.append(request)
        tokens = list(self.tokens[: request.max_tokens])
        stopped = self.stop_token in tokens
        if stopped:
            tokens = tokens[: tokens.index(self.stop_token) + 1]
        versions = [span(1, self.switch), span(2, 1 << 30)]
        for start in range(0, len(tokens), request.stride_tokens):
            piece = tokens[start : start + request.stride_tokens]
            last = start + len(piece) == len(tokens)
            self.handed_out += len(piece)
            yield EngineOutput(
                token_ids=piece,
                logprobs=[-float(token) for token in piece],
                versions=slice_spans(versions, start, start + len(piece)),
                cached_tokens=1,
                finish=None if not last else "stop" if stopped else "length",
            )


class UnevenEngine(ScriptedEngine):
    """Hands out strides, some cut short as by a change of weights; knows what could have been lost meanwhile."""

    durable = 0
    most_gathered = 0

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        sizes = [request.stride_tokens, 1, request.stride_tokens // 2 + 1] * 9
        for number, size in enumerate(sizes, start=1):
            self.most_gathered = max(self.most_gathered, self.handed_out - self.durable + request.stride_tokens)
            begin, self.handed_out = self.handed_out, self.handed_out + size
            yield EngineOutput(
                token_ids=[100 + token for token in range(begin, self.handed_out)],
                logprobs=[-1.0] * size,
                versions=[span(1, size)],
                cached_tokens=0,
                finish="stop" if number == len(sizes) else None,
            )


def segment(end_tokens: int, response: Sequence[int] = (), end_reason: EndReason = BUDGET) -> Segment:
    return Segment("s", "t", pack_token_ids((7, 8)), pack_token_ids(response), end_tokens, end_reason)


def settings(chunk_tokens: int = 4, max_period: int = 0, min_repeats: int = 0) -> SegmentSettings:
    stop = RepetitionStop(max_period=max_period, min_repeats=min_repeats)
    return SegmentSettings(Sampling(temperature=1), stop, (99,), chunk_tokens)


async def collect(engine: Engine, segment: Segment, settings: SegmentSettings) -> list[buffer_pb2.Chunk]:
    return [chunk async for chunk in generate_segment(engine, segment, settings)]


def tokens_of(*chunks: buffer_pb2.Chunk) -> list[int]:
    return [token for chunk in chunks for token in unpack_token_ids(chunk.token_ids)]


@given(st.integers(0, 100), st.integers(0, 100), st.integers(1, 100), st.integers(1, 100), st.integers(1, 100))
def test_a_segment_ends_at_the_nearest_limit(held: int, leased: int, budget: int, cap: int, room: int) -> None:
    end, reason = plan_end(stored=held, leased=leased, budget=budget, cap=cap, room=room)
    assert end == max(held, min(leased + budget, cap, room))
    assert (reason == MAX_RESPONSE_TOKENS) == (end >= min(cap, room))


def test_a_resumed_trajectory_gets_what_its_cap_leaves() -> None:
    assert plan_end(stored=50, leased=50, budget=32, cap=64, room=1000) == (64, MAX_RESPONSE_TOKENS)
    assert plan_end(stored=32, leased=32, budget=16, cap=64, room=1000) == (48, BUDGET)


def test_a_call_that_was_cut_off_gets_no_second_budget() -> None:
    assert plan_end(stored=20, leased=8, budget=16, cap=64, room=1000) == (24, BUDGET)
    assert plan_end(stored=24, leased=8, budget=16, cap=64, room=1000) == (24, BUDGET)


async def test_chunks_are_whole_and_the_last_one_says_why() -> None:
    engine = ScriptedEngine(range(100, 120), stop=99)
    chunks = await collect(engine, segment(13, response=(1, 2, 3)), settings())
    assert [chunk.offset for chunk in chunks] == [3, 7, 11]
    assert [len(tokens_of(chunk)) for chunk in chunks] == [4, 4, 2]
    assert [chunk.end_reason for chunk in chunks] == [0, 0, BUDGET]
    tokens = tokens_of(*chunks)
    assert tokens == list(range(100, 110))
    assert [logprob for chunk in chunks for logprob in unpack_logprobs(chunk.logprobs)] == [
        -float(token) for token in tokens
    ]
    assert list(engine.requests[0].token_ids) == [7, 8, 1, 2, 3]
    assert engine.requests[0].max_tokens == 10


class DrainingEngine(ScriptedEngine):
    """Ends requests before they have a token."""

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        yield EngineOutput(token_ids=[], logprobs=[], versions=[], cached_tokens=0, finish="abort")


async def test_the_tokens_that_were_there_are_counted_once_the_engine_has_read_them() -> None:
    counted = segment(8, response=(1, 2, 3))
    await collect(ScriptedEngine(range(100, 120), stop=99), counted, settings())
    assert (counted.cached_tokens, counted.prefilled_tokens) == (1, 4)
    waiting = segment(8, response=(1, 2, 3))
    with pytest.raises(RequestAbortedError):
        await collect(DrainingEngine((), stop=99), waiting, settings())
    assert (waiting.cached_tokens, waiting.prefilled_tokens) == (0, 0)


@pytest.mark.parametrize(("chunk_tokens", "min_repeats"), [(4, 0), (64, 0), (64, 3), (48, 3)])
async def test_no_more_than_a_chunk_gathers(chunk_tokens: int, min_repeats: int) -> None:
    engine = UnevenEngine((), stop=99)
    async for chunk in generate_segment(engine, segment(1000), settings(chunk_tokens, 4, min_repeats)):
        assert len(tokens_of(chunk)) <= chunk_tokens
        engine.durable += len(tokens_of(chunk))
    assert engine.durable == engine.handed_out
    assert engine.most_gathered <= chunk_tokens


async def test_a_stop_token_ends_the_response_and_belongs_to_it() -> None:
    chunks = await collect(ScriptedEngine([5, 6, 99, 7], stop=99), segment(50), settings())
    assert [(tokens_of(chunk), chunk.end_reason) for chunk in chunks] == [([5, 6, 99], STOP)]


async def test_no_room_ends_without_the_engine() -> None:
    engine = ScriptedEngine([5], stop=99)
    [chunk] = await collect(engine, segment(2, response=(1, 2), end_reason=MAX_RESPONSE_TOKENS), settings())
    assert (tokens_of(chunk), chunk.end_reason, engine.requests) == ([], MAX_RESPONSE_TOKENS, [])


async def test_repetition_is_cut_where_it_begins_to_count() -> None:
    engine = ScriptedEngine([10, 11, 12] + [5, 6] * 500, stop=99)
    chunks = await collect(engine, segment(1000), settings(chunk_tokens=512, max_period=4, min_repeats=3))
    tokens = tokens_of(*chunks)
    assert tokens == [10, 11, 12, 5, 6, 5, 6, 5, 6]
    assert chunks[-1].end_reason == REPETITION
    assert sum(span.tokens for chunk in chunks for span in chunk.versions) == len(tokens)
    assert engine.handed_out <= 32


async def test_repetition_that_began_in_an_earlier_segment_is_seen() -> None:
    engine = ScriptedEngine([5, 6, 5, 6], stop=99)
    chunks = await collect(engine, segment(20, response=(1, 5, 6, 5, 6)), settings(max_period=4, min_repeats=3))
    assert tokens_of(*chunks) == [5, 6]
    assert chunks[-1].end_reason == REPETITION


async def test_a_stop_token_wins_over_a_repetition_that_it_completes() -> None:
    chunks = await collect(
        ScriptedEngine([99], stop=99), segment(20, response=(99, 99)), settings(max_period=1, min_repeats=3)
    )
    assert chunks[-1].end_reason == STOP


async def test_versions_follow_the_tokens_over_chunks() -> None:
    chunks = await collect(ScriptedEngine(range(20), stop=99, switch=6), segment(10), settings())
    assert [list(chunk.versions) for chunk in chunks] == [
        [span(1, 4)],
        [span(1, 2), span(2, 2)],
        [span(2, 2)],
    ]


SPANS = st.lists(st.builds(span, st.integers(0, 2), st.integers(1, 5)), max_size=8)


@given(spans=SPANS, begin=st.integers(0, 45), end=st.integers(0, 45))
def test_taken_spans_name_the_version_of_each_token(spans: list[VersionSpan], begin: int, end: int) -> None:
    versions = [span.policy_version for span in spans for _ in range(span.tokens)]
    taken = slice_spans(spans, begin, end)
    assert [span.policy_version for span in taken for _ in range(span.tokens)] == versions[begin:end]
    assert all(a.policy_version != b.policy_version for a, b in itertools.pairwise(taken))


@given(st.lists(st.tuples(st.integers(0, MAX_TEXT_BYTES + 9), st.booleans()), max_size=6), st.integers(0, 9))
def test_results_of_any_length_fit_into_messages(sizes: list[tuple[int, bool]], before: int) -> None:
    results: list[pb.SegmentEnd | pb.SegmentFailure] = []
    for number, (size, fails) in enumerate(sizes):
        text, left_out = bound_text("é" * (size // 2))
        assert len(text.encode()) + left_out == size // 2 * 2
        failure = pb.SegmentFailure(trajectory_id=str(number), reason="r")
        end = pb.SegmentEnd(trajectory_id=str(number), text=text, left_out_bytes=left_out, new_tokens=number)
        results.append(failure if fails else end)
    messages = list(pack_results(results, before))
    assert all(message.ByteSize() < MAX_MESSAGE_BYTES for message in messages)
    assert [each for message in messages for each in message.ended] == [
        r for r in results if isinstance(r, pb.SegmentEnd)
    ]
    assert [each for message in messages for each in message.failed] == [
        r for r in results if isinstance(r, pb.SegmentFailure)
    ]
    counts = [before, *(message.generated_tokens for message in messages)]
    assert counts == sorted(counts)
    assert counts[-1] - before == sum(r.new_tokens for r in results if isinstance(r, pb.SegmentEnd))
