"""Trajectories: leases, appends and reads of their tokens."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass

from perigee.errors import AbortedError, FailedPreconditionError, NotFoundError
from services.buffer.packing import ITEM_BYTES, unpack_spans
from services.buffer.scripts import ScriptRunner, Stake, load_script
from services.buffer.types import Chunk, EndReason, Lease, Outcome, Piece

LEASE = load_script("lease")
APPEND = load_script("append")
READ_HEADS = load_script("read_heads")
READ_TOKENS = load_script("read_tokens")

# Trajectories whose heads one script call reads: bounds the time that it holds the server.
HEADS_PER_CALL = 512
# Tokens that one script call reads, beyond the one range that it must: bounds the memory of a reply.
TOKENS_PER_CALL = 65536


@dataclass(frozen=True)
class _Head:
    trajectory_id: str
    prompt: bytes
    tokens: int
    epoch: int
    ending: EndReason
    versions: str


@dataclass(frozen=True)
class _Range:
    head: _Head
    first: int
    last: int


async def lease_trajectories(
    scripts: ScriptRunner, run_id: str, worker_id: str, trajectory_ids: Sequence[str]
) -> list[Lease]:
    """New leases, which fence every older one of the same trajectories.

    Raises NotFoundError for an unknown trajectory, FailedPreconditionError for a finished one; then none is leased.
    """
    word, value = await scripts.run(LEASE, run_id, worker_id, *trajectory_ids, stake=Stake.SEGMENT)
    if word == b"UNKNOWN":
        raise NotFoundError(f"trajectory {value.decode()!r} does not exist in run {run_id!r}")
    if word == b"FINISHED":
        raise FailedPreconditionError(f"trajectory {value.decode()!r} is finished: it cannot be leased")
    pairs = [pair.split(":") for pair in value.decode().split(",") if pair]
    return [
        Lease(trajectory_id, int(epoch), int(tokens))
        for trajectory_id, (epoch, tokens) in zip(trajectory_ids, pairs, strict=True)
    ]


async def append_chunks(scripts: ScriptRunner, run_id: str, chunks: Sequence[Chunk]) -> list[Outcome]:
    """The outcome of each chunk, in order."""
    arguments: list[str | bytes | int] = []
    for chunk in chunks:
        arguments += (
            chunk.trajectory_id,
            chunk.epoch,
            chunk.offset,
            chunk.tokens,
            chunk.logprobs,
            chunk.versions,
            int(chunk.ending),
        )
    ends = any(chunk.ending is not EndReason.OPEN for chunk in chunks)
    _, digits = await scripts.run(APPEND, run_id, *arguments, stake=Stake.SEGMENT if ends else Stake.NOTHING)
    return [Outcome(int(digit)) for digit in digits.decode()]


async def read_trajectories(
    scripts: ScriptRunner, run_id: str, trajectory_ids: Sequence[str], *, with_logprobs: bool, piece_tokens: int
) -> AsyncGenerator[Piece, None]:
    """Every trajectory as pieces of at most `piece_tokens` tokens, in the order asked for.

    Raises NotFoundError for an unknown trajectory, AbortedError when one is consumed while it is read.
    """
    for at in range(0, len(trajectory_ids), HEADS_PER_CALL):
        heads = await _read_heads(scripts, run_id, trajectory_ids[at : at + HEADS_PER_CALL])
        ranges = [span for head in heads for span in _cut(head, piece_tokens)]
        for batch in _batch(ranges):
            async for piece in _read_batch(scripts, run_id, batch, with_logprobs):
                yield piece


async def _read_heads(scripts: ScriptRunner, run_id: str, trajectory_ids: Sequence[str]) -> list[_Head]:
    word, *fields = await scripts.run(READ_HEADS, run_id, *trajectory_ids)
    if word == b"UNKNOWN":
        raise NotFoundError(f"trajectory {fields[0].decode()!r} does not exist in run {run_id!r}")
    rows, prompt_sizes = json.loads(fields[0])
    prompts, start = [], 0
    for size in prompt_sizes:
        prompts.append(fields[1][start : start + size])
        start += size
    return [
        _Head(trajectory_id, prompts[prompt], int(tokens), int(epoch), EndReason(int(ending)), versions)
        for trajectory_id, (prompt, tokens, epoch, ending, versions) in zip(trajectory_ids, rows, strict=True)
    ]


def _cut(head: _Head, piece_tokens: int) -> Iterator[_Range]:
    for first in range(0, max(head.tokens, 1), piece_tokens):
        yield _Range(head, first, min(first + piece_tokens, head.tokens))


def _batch(ranges: Sequence[_Range]) -> Iterator[list[_Range]]:
    batch: list[_Range] = []
    tokens = 0
    for span in ranges:
        if batch and tokens + span.last - span.first > TOKENS_PER_CALL:
            yield batch
            batch, tokens = [], 0
        batch.append(span)
        tokens += span.last - span.first
    if batch:
        yield batch


async def _read_batch(
    scripts: ScriptRunner, run_id: str, batch: Sequence[_Range], with_logprobs: bool
) -> AsyncGenerator[Piece, None]:
    arguments: list[str | bytes | int] = [int(with_logprobs)]
    for span in batch:
        if span.last > span.first:
            arguments += (span.head.trajectory_id, span.first * ITEM_BYTES, span.last * ITEM_BYTES - 1)
    _, tokens, logprobs = await scripts.run(READ_TOKENS, run_id, *arguments)
    if len(tokens) != sum(span.last - span.first for span in batch) * ITEM_BYTES:
        raise AbortedError(f"a trajectory of run {run_id!r} was consumed while it was read")
    start = 0
    for span in batch:
        stop = start + (span.last - span.first) * ITEM_BYTES
        yield Piece(
            trajectory_id=span.head.trajectory_id,
            prompt=span.head.prompt if span.first == 0 else b"",
            offset=span.first,
            tokens=tokens[start:stop],
            logprobs=logprobs[start:stop] if with_logprobs else b"",
            spans=unpack_spans(span.head.versions, span.first, span.last),
            last=span.last == span.head.tokens,
            ending=span.head.ending,
            epoch=span.head.epoch,
        )
        start = stop
