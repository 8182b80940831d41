"""Generates one segment: what a trajectory gains in one call, cut into chunks, with the reason for its end."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from enum import IntEnum

from services.rollout.engine import Engine, EngineRequest, VersionSpan
from services.rollout.repetition import RepetitionDetector, RepetitionRule
from services.rollout.sampling import SamplingSettings

# Tokens that may be generated past the point of repetition before it is seen.
REPETITION_STRIDE_TOKENS = 32


class EndReason(IntEnum):
    """Why a segment ended; the numbers are those of perigee.buffer.v1.EndReason."""

    STOP = 1
    REPETITION = 2
    RESPONSE_CAP = 3
    BUDGET = 4


@dataclass(frozen=True)
class Segment:
    """A sequence to continue."""

    segment_id: str
    """Unique among the segments in flight."""
    item_id: str
    """The trajectory or item; with the offset it decides the seed."""
    prompt_token_ids: Sequence[int]
    response_token_ids: Sequence[int]
    """Tokens of earlier segments."""
    end_tokens: int
    """Response tokens, earlier ones included, at which the segment ends."""
    end_reason: EndReason
    """Why it ends there: BUDGET or RESPONSE_CAP."""


@dataclass(frozen=True)
class SegmentSettings:
    """What the segments of one call share."""

    sampling: SamplingSettings
    repetition: RepetitionRule | None
    stop_token_ids: tuple[int, ...]
    chunk_tokens: int


@dataclass(frozen=True)
class SegmentChunk:
    """Consecutive tokens of a segment; the last chunk has an end reason, and may be empty."""

    offset: int
    """Response tokens before this chunk."""
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    versions: Sequence[VersionSpan]
    end_reason: EndReason | None
    cached_tokens: int


def plan_end(*, held: int, leased: int, budget: int, cap: int, room: int) -> tuple[int, EndReason]:
    """Where a segment ends, in response tokens, and why.

    A trajectory with `leased` tokens may add `budget`; `held` can be more than `leased` when an earlier call under the
    same lease was cut off. `cap` bounds the whole response, earlier segments included, and `room` is what the context
    leaves beside the prompt.
    """
    whole = max(min(cap, room), held)
    part = max(leased + budget, held)
    return (part, EndReason.BUDGET) if part < whole else (whole, EndReason.RESPONSE_CAP)


async def generate_segment(
    engine: Engine, segment: Segment, settings: SegmentSettings
) -> AsyncGenerator[SegmentChunk, None]:
    """The chunks of one segment, each of at most `chunk_tokens` tokens.

    Raises EngineDiedError when the engine dies.
    """
    offset = len(segment.response_token_ids)
    max_tokens = segment.end_tokens - offset
    if max_tokens <= 0:
        yield SegmentChunk(offset, [], [], [], segment.end_reason, 0)
        return
    rule = settings.repetition
    detector = RepetitionDetector(rule) if rule is not None else None
    if detector is not None and rule is not None:
        detector.feed(segment.response_token_ids[-rule.window_tokens :])
    request = EngineRequest(
        request_id=segment.segment_id,
        token_ids=[*segment.prompt_token_ids, *segment.response_token_ids],
        max_tokens=max_tokens,
        temperature=settings.sampling.temperature,
        seed=settings.sampling.seed_of(segment.item_id, offset),
        stop_token_ids=settings.stop_token_ids,
        stride_tokens=min(settings.chunk_tokens, REPETITION_STRIDE_TOKENS if detector else settings.chunk_tokens),
    )
    token_ids: list[int] = []
    logprobs: list[float] = []
    versions: list[VersionSpan] = []
    end_reason: EndReason | None = None
    async with aclosing(engine.generate(request)) as outputs:
        async for output in outputs:
            cut = detector.feed(output.token_ids) if detector is not None else None
            if cut is not None and not (output.finish == "stop" and cut == len(output.token_ids)):
                end_reason = EndReason.REPETITION
            elif output.finish is not None:
                end_reason = EndReason.STOP if output.finish == "stop" else segment.end_reason
            kept = cut if cut is not None else len(output.token_ids)
            token_ids += output.token_ids[:kept]
            logprobs += output.logprobs[:kept]
            versions += take_spans(output.versions, 0, kept)
            while len(token_ids) > settings.chunk_tokens or (token_ids and end_reason is not None):
                size = min(len(token_ids), settings.chunk_tokens)
                last = size == len(token_ids)
                yield SegmentChunk(
                    offset,
                    token_ids[:size],
                    logprobs[:size],
                    take_spans(versions, 0, size),
                    end_reason if last else None,
                    output.cached_tokens,
                )
                versions = take_spans(versions, size, len(token_ids))
                token_ids, logprobs, offset = token_ids[size:], logprobs[size:], offset + size
            if end_reason is not None:
                return


def take_spans(spans: Sequence[VersionSpan], begin: int, end: int) -> list[VersionSpan]:
    """The spans over tokens [begin, end), neighbours of one version joined."""
    taken: list[VersionSpan] = []
    first = 0
    for span in spans:
        tokens = min(first + span.tokens, end) - max(first, begin)
        first += span.tokens
        if tokens <= 0:
            continue
        if taken and taken[-1].policy_version == span.policy_version:
            tokens += taken.pop().tokens
        taken.append(VersionSpan(span.policy_version, tokens))
    return taken
