"""Generates responses to prompts in a request, without the buffer."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from functools import partial

from perigee.buffer.packing import ITEM_BYTES, count_tokens, unpack_token_ids
from perigee.buffer.v1 import buffer_pb2
from perigee.errors import FieldViolation, InvalidArgumentError, UnavailableError
from perigee.rollout.v1 import rollout_pb2 as pb
from services.kit.tracing import describe, span
from services.rollout.engine import EngineDiedError
from services.rollout.segment import (
    Emit,
    Segment,
    SegmentSettings,
    bound_text,
    end_reason_label,
    generate_segment,
    merge,
    plan_end,
)
from services.rollout.worker import SEGMENTS, Admission, Worker

_calls = itertools.count()


def check_items(items: Sequence[pb.GenerateItem], worker: Worker) -> None:
    """Raises InvalidArgumentError with a violation for each item that cannot be generated.

    Raises FailedPreconditionError that names images which are not here.
    """
    model = worker.model
    if model.vision is not None:
        worker.images.find(digest for item in items for digest in item.image_digests)
    violations = [
        FieldViolation(f"items[{index}].{field}", description)
        for index, item in enumerate(items)
        for field, description in _find_faults(item, worker)
    ]
    if len({item.id for item in items}) != len(items):
        violations.append(FieldViolation("items.id", "two items have the same id"))
    if violations:
        raise InvalidArgumentError.for_fields(violations)


async def generate(
    worker: Worker, request: pb.GenerateRequest, settings: SegmentSettings
) -> AsyncGenerator[pb.GenerateResponse, None]:
    """Generates the response to each item, in chunks as they come; with `text_only` only the last one of each.

    Raises InvalidArgumentError for items that cannot be generated, FailedPreconditionError when the worker holds no
    weights or other ones, ResourceExhaustedError when it has too much to do, UnavailableError when the engine dies.
    """
    check_items(request.items, worker)
    worker.check_ready(request.run_id, request.policy_version if request.HasField("policy_version") else None)
    call = next(_calls)
    digests = [digest for item in request.items for digest in item.image_digests]
    with worker.admit(len(request.items)) as admission, worker.images.hold(digests):
        producers = [
            partial(_generate_item, worker, settings, admission, f"generate-{call}-{i}", item, request.text_only)
            for i, item in enumerate(request.items)
        ]
        try:
            async with aclosing(merge(producers)) as batches:
                async for batch in batches:
                    for response in batch:
                        yield response
        except EngineDiedError as error:
            raise UnavailableError(f"The engine died and is restarted: {error}", retry_after_s=10.0) from error
        await worker.count_engine_seconds()


async def _generate_item(
    worker: Worker,
    settings: SegmentSettings,
    admission: Admission,
    segment_id: str,
    item: pb.GenerateItem,
    text_only: bool,
    emit: Emit[pb.GenerateResponse],
) -> None:
    """Generates the response to one item and emits its chunks."""
    token_ids = bytearray()
    async with worker.images.prepared(item.prompt_token_ids, item.image_digests) as prompt:
        room = worker.model.context_tokens - len(prompt.expanded_ids)
        end_tokens, _ = plan_end(stored=0, leased=0, budget=item.max_tokens, cap=item.max_tokens, room=room)
        end_reason = buffer_pb2.END_REASON_MAX_RESPONSE_TOKENS
        segment = Segment(segment_id, item.id, item.prompt_token_ids, b"", end_tokens, end_reason, prompt)
        with span("segment", item=item.id) as opened:
            async with aclosing(generate_segment(worker.engine, segment, settings)) as chunks:
                async for chunk in chunks:
                    token_ids += chunk.token_ids
                    worker.count_generated(count_tokens(chunk.token_ids))
                    response = pb.GenerateResponse(id=item.id)
                    if not text_only:
                        response.offset = chunk.offset
                        response.token_ids, response.logprobs = chunk.token_ids, chunk.logprobs
                        response.versions.extend(chunk.versions)
                    if chunk.end_reason:
                        response.end_reason = chunk.end_reason
                        text = worker.model.decode(unpack_token_ids(bytes(token_ids)))
                        response.text, response.left_out_bytes = bound_text(text)
                        response.tokens = len(token_ids) // ITEM_BYTES
                        SEGMENTS.labels(end_reason_label(chunk.end_reason)).inc()
                        describe(opened, tokens=response.tokens, end=end_reason_label(chunk.end_reason))
                        admission.leave()
                    if chunk.end_reason or not text_only:
                        await emit(response)


def _find_faults(item: pb.GenerateItem, worker: Worker) -> Iterator[tuple[str, str]]:
    """Yields the fields of an item that are wrong, with descriptions."""
    model = worker.model
    tokens = count_tokens(item.prompt_token_ids)
    if tokens == 0:
        yield "prompt_token_ids", "the prompt is empty"
    elif len(item.prompt_token_ids) % ITEM_BYTES:
        yield "prompt_token_ids", f"{len(item.prompt_token_ids)} bytes are not {ITEM_BYTES} for each token"
    elif tokens >= model.context_tokens:
        yield "prompt_token_ids", f"{tokens} tokens leave no room in the model's context of {model.context_tokens}"
    elif (largest := max(unpack_token_ids(item.prompt_token_ids))) >= model.vocabulary_size:
        yield "prompt_token_ids", f"{largest} is not in the vocabulary of {model.vocabulary_size}"
    else:
        yield from _find_image_faults(item, worker)
    if item.max_tokens < 1:
        yield "max_tokens", "must be at least 1"


def _find_image_faults(item: pb.GenerateItem, worker: Worker) -> Iterator[tuple[str, str]]:
    """Yields what is wrong with the images of an item whose prompt is in order without them."""
    model, images = worker.model, len(item.image_digests)
    try:
        if not images and model.vision is None:
            return
        vision = model.require_vision()
        sizes = [(image.width, image.height) for image in worker.images.find(item.image_digests)]
        tokens = len(vision.expand(unpack_token_ids(item.prompt_token_ids), sizes))
    except InvalidArgumentError as error:
        yield from ((each.field, each.description) for each in error.violations)
        return
    if images > worker.config.images.max_per_prompt:
        yield "image_digests", f"{images} images are more than rollout.images.max_per_prompt allows"
    if tokens >= model.context_tokens:
        yield "image_digests", f"{tokens} tokens, those of the images included, leave no room in the model's context"
