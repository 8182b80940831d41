"""Segments: what a trajectory gains in one call, generated in chunks, with the reason for the end; many at once.

Only sampling settings whose logprobs the trainer can use are accepted. Truncating or penalizing the distribution makes
the sampled one another than the policy's: the ratio between the two is then wrong for every token, and no later
correction knows which tokens were cut.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from prometheus_client import Counter

from perigee.buffer.packing import count_tokens, pack_logprobs, pack_token_ids, unpack_token_ids
from perigee.buffer.v1 import buffer_pb2
from perigee.buffer.v1.buffer_pb2 import VersionSpan
from perigee.errors import FieldViolation, InvalidArgumentError, first_error
from perigee.rollout.v1 import rollout_pb2 as pb
from services.rollout.engine import Engine, EngineOutput, EngineRequest, RequestAbortedError
from services.rollout.images import PreparedPrompt
from services.rollout.repetition import RepetitionDetector

CACHED_TOKENS = Counter("perigee_rollout_cached_tokens", "Prompt and earlier tokens served from the prefix cache.")
PREFILLED_TOKENS = Counter("perigee_rollout_prefilled_tokens", "Prompt and earlier tokens that requests computed.")

T = TypeVar("T")
Emit = Callable[[T], Awaitable[None]]
Producer = Callable[[Emit[T]], Coroutine[Any, Any, None]]
EndReason: TypeAlias = "buffer_pb2.EndReason.ValueType"

# Tokens that may be generated past the point of repetition before it is seen.
REPETITION_STRIDE_TOKENS = 32
MAX_PERIOD = 4096
# Tokens, log-probabilities and expert choices of a chunk, and of those that share an append: two of them stay below
# half a message.
MAX_CHUNK_BYTES = 1 << 20
# Text of a response beyond which no message holds it, that to the reward service included.
MAX_TEXT_BYTES = 3 << 20
# Items that producers may be ahead of the caller.
QUEUE_ITEMS = 1024
MAX_TEMPERATURE = 10.0
# Below this the engine takes a temperature for 0.
MIN_TEMPERATURE = 1e-2
# Values of the other settings that leave the distribution as it is.
NEUTRAL: dict[str, tuple[float, ...]] = {
    "top_p": (1.0,),
    "top_k": (0, -1),
    "min_p": (0.0,),
    "repetition_penalty": (1.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
}


@dataclass
class Segment:
    """Sequence to continue; token ids are packed."""

    segment_id: str
    """Unique among the segments in flight."""
    item_id: str
    """Trajectory or item; with the offset it decides the seed."""
    prompt_token_ids: bytes
    response_token_ids: bytes
    """Tokens of earlier segments."""
    end_tokens: int
    """Response tokens, earlier ones included, at which the segment ends."""
    end_reason: EndReason
    """Reason for the end there: BUDGET or MAX_RESPONSE_TOKENS."""
    prompt: PreparedPrompt | None = None
    """The prompt's images, where it has any."""
    cached_tokens: int = 0
    """Prompt and earlier tokens served from the prefix cache, once the engine has said so."""
    prefilled_tokens: int = 0
    """The others of them, which the engine computed."""


@dataclass(frozen=True)
class SegmentSettings:
    """Settings that the segments of one call share; `repetition_stop.min_repeats` 0 turns that stop off."""

    sampling: pb.Sampling
    repetition_stop: pb.RepetitionStop
    stop_token_ids: tuple[int, ...]
    chunk_tokens: int
    cache_salt: str = ""
    """What keeps them from prefixes that were cached with another one."""


def end_reason_label(end_reason: EndReason) -> str:
    """Returns the name of an end reason as metrics and logs have it, `stop` for instance."""
    return buffer_pb2.EndReason.Name(end_reason).removeprefix("END_REASON_").lower()


def check_sampling(sampling: pb.Sampling, *, trained_on: bool) -> None:
    """Refuses settings whose logprobs cannot be corrected; `trained_on` also refuses greedy decoding.

    Raises InvalidArgumentError with one violation per field.
    """
    violations = [
        FieldViolation(
            f"sampling.{name}",
            f"{getattr(sampling, name)} changes the sampled distribution, so its logprobs cannot be corrected; "
            f"leave it unset",
        )
        for name, neutral in NEUTRAL.items()
        if sampling.HasField(name) and getattr(sampling, name) not in neutral  # type: ignore[arg-type]
    ]
    greedy = sampling.temperature == 0
    if greedy and trained_on:
        violations.append(
            FieldViolation("sampling.temperature", "0 is greedy decoding, whose logprobs are no policy's; use 1")
        )
    elif not greedy and not MIN_TEMPERATURE <= sampling.temperature <= MAX_TEMPERATURE:
        allowed = f"between {MIN_TEMPERATURE} and {MAX_TEMPERATURE}{'' if trained_on else ', or 0'}"
        violations.append(FieldViolation("sampling.temperature", f"{sampling.temperature} is not {allowed}"))
    if violations:
        raise InvalidArgumentError.for_fields(violations)


def check_repetition_stop(stop: pb.RepetitionStop) -> None:
    """Raises InvalidArgumentError for a stop that would cut every response, or takes too long to look for."""
    if stop.min_repeats == 0:
        return
    if stop.min_repeats < 2:
        raise InvalidArgumentError.for_field("repetition_stop.min_repeats", "1 would cut every response; use 2 or more")
    if not 1 <= stop.max_period <= MAX_PERIOD:
        raise InvalidArgumentError.for_field(
            "repetition_stop.max_period", f"{stop.max_period} is not between 1 and {MAX_PERIOD}"
        )


def segment_seed(sampling: pb.Sampling, item_id: str, offset: int) -> int | None:
    """Returns a seed of its own for each item and offset, so that the items of one call differ; None without a seed."""
    if not sampling.HasField("seed"):
        return None
    digest = hashlib.blake2b(f"{sampling.seed}/{item_id}/{offset}".encode(), digest_size=8).digest()
    # The engine takes signed 64-bit seeds.
    return int.from_bytes(digest) >> 1


def bound_text(text: str) -> tuple[str, int]:
    """Returns a text and 0, or an empty one and the bytes of a text that no message holds."""
    # No character has more than 4 bytes: most texts need no count.
    if len(text) * 4 <= MAX_TEXT_BYTES or (size := len(text.encode(errors="replace"))) <= MAX_TEXT_BYTES:
        return text, 0
    return "", size


def plan_end(*, stored: int, leased: int, budget: int, cap: int, room: int) -> tuple[int, EndReason]:
    """Returns where a segment ends, in response tokens, and why.

    A trajectory with `leased` tokens may add `budget`; `stored` is more than `leased` when an earlier call under the
    same lease was cut off. `cap` bounds the whole response, earlier segments included, and `room` is what the context
    leaves beside the prompt.
    """
    whole = max(min(cap, room), stored)
    part = max(leased + budget, stored)
    return (part, buffer_pb2.END_REASON_BUDGET) if part < whole else (whole, buffer_pb2.END_REASON_MAX_RESPONSE_TOKENS)


async def generate_segment(
    engine: Engine, segment: Segment, settings: SegmentSettings
) -> AsyncGenerator[buffer_pb2.Chunk, None]:
    """Generates the chunks of one segment, each of at most `chunk_tokens` tokens; only the last has an end reason.

    Raises EngineDiedError when the engine dies, and RequestAbortedError after the last token of an interrupted segment.
    """
    offset = count_tokens(segment.response_token_ids)
    if segment.end_tokens <= offset:
        yield buffer_pb2.Chunk(trajectory_id=segment.item_id, offset=offset, end_reason=segment.end_reason)
        return
    detector = _resume_detector(segment, settings.repetition_stop)
    stride = min(settings.chunk_tokens, REPETITION_STRIDE_TOKENS) if detector else settings.chunk_tokens
    cutter = _ChunkCutter(segment.item_id, offset, settings.chunk_tokens, stride)
    response = unpack_token_ids(segment.response_token_ids)
    request = EngineRequest(
        request_id=segment.segment_id,
        token_ids=[*unpack_token_ids(segment.prompt_token_ids), *response],
        max_tokens=segment.end_tokens - offset,
        temperature=settings.sampling.temperature,
        seed=segment_seed(settings.sampling, segment.item_id, offset),
        stop_token_ids=settings.stop_token_ids,
        stride_tokens=stride,
        images=segment.prompt.images if segment.prompt else (),
        cache_salt=settings.cache_salt,
        expanded_ids=[*segment.prompt.expanded_ids, *response] if segment.prompt else (),
    )
    async with aclosing(engine.generate(request)) as outputs:
        async for output in outputs:
            # One that waits in the engine may end without having been read.
            if output.token_ids and not segment.prefilled_tokens:
                _count_prefill(segment, request, output)
            kept, end_reason = _find_end(output, detector, segment.end_reason)
            aborted = output.finish == "abort" and not end_reason
            for chunk in cutter.add(output, kept, end_reason, is_last=bool(end_reason) or aborted):
                yield chunk
            if aborted:
                raise RequestAbortedError("the engine ended the request early")
            if end_reason:
                return


def _count_prefill(segment: Segment, request: EngineRequest, output: EngineOutput) -> None:
    """Counts what the first output says of the prompt and the earlier tokens, of which at least one is computed."""
    segment.cached_tokens = output.cached_tokens
    segment.prefilled_tokens = len(request.expanded_ids or request.token_ids) - output.cached_tokens
    CACHED_TOKENS.inc(segment.cached_tokens)
    PREFILLED_TOKENS.inc(segment.prefilled_tokens)


def _resume_detector(segment: Segment, stop: pb.RepetitionStop) -> RepetitionDetector | None:
    """Returns a detector that knows the earlier tokens that can take part in a match; None when the stop is off."""
    if not stop.min_repeats:
        return None
    detector = RepetitionDetector(stop)
    detector.feed(unpack_token_ids(segment.response_token_ids)[-stop.max_period * stop.min_repeats :])
    return detector


def _find_end(output: EngineOutput, detector: RepetitionDetector | None, at_limit: EndReason) -> tuple[int, EndReason]:
    """Returns how many tokens of an output to keep, and why the segment ends with them, if it does.

    A stop token that completes a repetition wins over it. `at_limit` is the reason when max_tokens are there.
    """
    tokens = len(output.token_ids)
    cut = detector.feed(output.token_ids) if detector is not None else None
    if cut is not None and not (output.finish == "stop" and cut == tokens):
        return cut, buffer_pb2.END_REASON_REPETITION
    if output.finish in (None, "abort"):
        return tokens, buffer_pb2.END_REASON_UNSPECIFIED
    return tokens, buffer_pb2.END_REASON_STOP if output.finish == "stop" else at_limit


class _ChunkCutter:
    """Gathers tokens of a segment, which come in outputs of `stride_tokens`, and cuts them into chunks."""

    def __init__(self, item_id: str, offset: int, chunk_tokens: int, stride_tokens: int) -> None:
        self._item_id = item_id
        self._offset = offset
        self._chunk_tokens = chunk_tokens
        self._stride_tokens = stride_tokens
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._versions: list[VersionSpan] = []
        # As many as tokens, or too few where the engine did not give those of each.
        self._experts: list[bytes] = []

    def add(
        self, output: EngineOutput, kept: int, end_reason: EndReason, *, is_last: bool
    ) -> Iterator[buffer_pb2.Chunk]:
        """Adds the first `kept` tokens of an output; yields them once the next one could fill more than a chunk.

        So no more than a chunk's tokens gather here and in the engine. At the end all of them are yielded; an output
        that ends a segment has a token, for the chunk that says why.
        """
        self._token_ids += output.token_ids[:kept]
        self._logprobs += output.logprobs[:kept]
        self._experts += output.experts[:kept]
        self._versions = slice_spans([*self._versions, *output.versions], 0, len(self._token_ids))
        while self._token_ids and (is_last or len(self._token_ids) + self._stride_tokens > self._chunk_tokens):
            yield self._cut(min(len(self._token_ids), self._chunk_tokens), end_reason)

    def _cut(self, tokens: int, end_reason: EndReason) -> buffer_pb2.Chunk:
        """Returns the next chunk; the last one has the end reason."""
        chunk = buffer_pb2.Chunk(
            trajectory_id=self._item_id,
            offset=self._offset,
            token_ids=pack_token_ids(self._token_ids[:tokens]),
            logprobs=pack_logprobs(self._logprobs[:tokens]),
            versions=slice_spans(self._versions, 0, tokens),
            end_reason=end_reason if tokens == len(self._token_ids) else buffer_pb2.END_REASON_UNSPECIFIED,
            experts=b"".join(self._experts[:tokens]) if len(self._experts) == len(self._token_ids) else b"",
        )
        self._versions = slice_spans(self._versions, tokens, len(self._token_ids))
        self._token_ids, self._logprobs = self._token_ids[tokens:], self._logprobs[tokens:]
        self._experts = self._experts[tokens:]
        self._offset += tokens
        return chunk


def slice_spans(spans: Iterable[VersionSpan], begin: int, end: int) -> list[VersionSpan]:
    """Returns the spans over tokens [begin, end), neighbours of one version joined."""
    sliced: list[VersionSpan] = []
    first = 0
    for span in spans:
        tokens = min(first + span.tokens, end) - max(first, begin)
        first += span.tokens
        if tokens <= 0:
            continue
        if sliced and sliced[-1].policy_version == span.policy_version:
            tokens += sliced.pop().tokens
        sliced.append(VersionSpan(policy_version=span.policy_version, tokens=tokens))
    return sliced


async def merge(producers: Iterable[Producer[T]]) -> AsyncGenerator[list[T], None]:
    """Runs many producers at once and yields what they emit, in batches, through one bounded queue.

    The first producer that raises cancels the others, and its error is raised here. Closing the iterator cancels all
    producers and waits for them. `producers` is read lazily on a task of its own, so it may start as it goes.
    """
    # None follows the last item.
    queue: asyncio.Queue[T | None] = asyncio.Queue(QUEUE_ITEMS)

    async def run_all() -> BaseException | None:
        error: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for producer in producers:
                    group.create_task(producer(queue.put))
        except BaseExceptionGroup as failed:
            error = first_error(failed)
        await queue.put(None)
        return error

    runner = asyncio.create_task(run_all())
    try:
        ended = False
        while not ended:
            items = [await queue.get()]
            while not queue.empty():
                items.append(queue.get_nowait())
            ended = items[-1] is None
            if ready := [item for item in items if item is not None]:
                yield ready
        if (error := await runner) is not None:
            raise error
    finally:
        runner.cancel()
        await asyncio.wait([runner])
