"""Generates from prompts in a request, without the buffer."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

from perigee.errors import FieldViolation, InvalidArgumentError, UnavailableError
from services.rollout.engine import EngineDiedError
from services.rollout.generation import EndReason, Segment, SegmentChunk, SegmentSettings, generate_segment, plan_end
from services.rollout.merging import Emit, merge
from services.rollout.metrics import GENERATED_TOKENS, SEGMENTS
from services.rollout.model_folder import ModelFolder
from services.rollout.worker import Admission, Worker

_calls = itertools.count()


@dataclass(frozen=True)
class Item:
    """A prompt to answer with at most `max_tokens` tokens."""

    item_id: str
    prompt_token_ids: Sequence[int]
    max_tokens: int


@dataclass(frozen=True)
class AnswerChunk:
    """A piece of an item's response; on the last one `text` is the whole response."""

    item_id: str
    chunk: SegmentChunk
    text: str


def check_items(items: Sequence[Item], model: ModelFolder) -> None:
    """Raises InvalidArgumentError with a violation for each item that cannot be generated."""
    violations = [
        FieldViolation(f"items[{index}].{field}", description)
        for index, item in enumerate(items)
        for field, description in _find_faults(item, model)
    ]
    if len({item.item_id for item in items}) != len(items):
        violations.append(FieldViolation("items.id", "two items have the same id"))
    if violations:
        first = violations[0]
        raise InvalidArgumentError(f"{first.field}: {first.description}", violations=violations)


async def answer(
    worker: Worker, run_id: str, items: Sequence[Item], settings: SegmentSettings, policy_version: int | None
) -> AsyncGenerator[list[AnswerChunk], None]:
    """Pieces of the responses as they come.

    Raises FailedPreconditionError when the worker holds no weights or other ones, ResourceExhaustedError when it has
    too much to do, UnavailableError when the engine dies.
    """
    check_items(items, worker.model)
    worker.check_ready(run_id, policy_version)
    call = next(_calls)
    with worker.admit(len(items)) as admission:
        producers = [
            partial(_answer_item, worker, settings, admission, f"generate-{call}-{i}", item)
            for i, item in enumerate(items)
        ]
        try:
            async with aclosing(merge(producers)) as batches:
                async for batch in batches:
                    yield batch
        except EngineDiedError as error:
            raise UnavailableError(f"The engine died and is restarted: {error}", retry_after_s=10.0) from error


async def _answer_item(
    worker: Worker,
    settings: SegmentSettings,
    admission: Admission,
    segment_id: str,
    item: Item,
    emit: Emit[AnswerChunk],
) -> None:
    room = worker.model.context_tokens - len(item.prompt_token_ids)
    end_tokens, _ = plan_end(held=0, leased=0, budget=item.max_tokens, cap=item.max_tokens, room=room)
    segment = Segment(segment_id, item.item_id, item.prompt_token_ids, (), end_tokens, EndReason.RESPONSE_CAP)
    tokens: list[int] = []
    async with aclosing(generate_segment(worker.engine, segment, settings)) as chunks:
        async for chunk in chunks:
            tokens += chunk.token_ids
            worker.generated_tokens += len(chunk.token_ids)
            GENERATED_TOKENS.inc(len(chunk.token_ids))
            text = ""
            if chunk.end_reason is not None:
                text = worker.model.decode(tokens)
                SEGMENTS.labels(chunk.end_reason.name.lower()).inc()
                admission.leave()
            await emit(AnswerChunk(item.item_id, chunk, text))


def _find_faults(item: Item, model: ModelFolder) -> list[tuple[str, str]]:
    faults = []
    length = len(item.prompt_token_ids)
    if length == 0:
        faults.append(("prompt_token_ids", "the prompt is empty"))
    elif length >= model.context_tokens:
        faults.append(
            ("prompt_token_ids", f"{length} tokens leave no room in the model's context of {model.context_tokens}")
        )
    elif max(item.prompt_token_ids) >= model.vocabulary_size:
        faults.append(
            ("prompt_token_ids", f"{max(item.prompt_token_ids)} is not in the vocabulary of {model.vocabulary_size}")
        )
    if item.max_tokens < 1:
        faults.append(("max_tokens", "must be at least 1"))
    return faults
