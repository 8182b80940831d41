"""Runs, groups and trajectories in Redis: each change is one Lua script, each value the contract's message.

All keys of a run share the hash tag `{run}`, so one change of many keys is one slot of a cluster:

    perigee:{R}:run             hash: configuration digest, iteration, policy version, coordinator state
    perigee:{R}:groups          sorted set: ids of the groups not consumed, by the order of their creation
    perigee:{R}:group:G         hash: prompt id, iteration, packed prompt tokens, trajectory ids as JSON, digests of
                                images
    perigee:{R}:trajectory:T    hash: group, epoch, worker, token count, end reason, versions, verdict, reward, bytes
                                of a token's expert choices, files that hold its first tokens
    perigee:{R}:tokens:T        string: response tokens that are in no file, packed; the next two are of the same
    perigee:{R}:logprobs:T      string: log-probabilities, packed
    perigee:{R}:experts:T       string: expert choices, packed; missing where none are recorded
    perigee:{R}:consumed        sorted set: ids of the groups that the last iterations consumed, by iteration
    perigee:{R}:prompts         sorted set: ids of the prompts that have statistics, in lexical order
    perigee:{R}:statistics      hash: prompt id -> `trajectories correct`
    perigee:{R}:image:D         string: file of an image, or as much of it as is here
    perigee:{R}:images          hash: digest of a whole, verified image -> its bytes
    perigee:{R}:arriving        hash: digest of an image that is not whole -> `bytes serial`
    perigee:{R}:references      hash: digest -> how often groups name the image
    perigee:{R}:unreferenced    sorted set: digests by the time up to which they are kept without a group
    perigee:{R}:unmoved         sorted set: ids of trajectories with tokens to be moved to files, by the time up to
                                which somebody is at it
    perigee:{R}:files           hash: name of a file -> writing, held (by a trajectory), retired, unknown or deleted
    perigee:{R}:unreferenced_files
                                sorted set: names by the time up to which they are kept without a trajectory

Versions are stored as text: `version:stop,version:stop` names the policy version of the tokens up to each response
offset, so that spans are compared, cut and joined without counting.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from prometheus_client import Counter

from perigee.buffer.client import UNFINISHED
from perigee.buffer.packing import ITEM_BYTES, count_tokens
from perigee.buffer.v1 import buffer_pb2 as pb
from perigee.errors import AbortedError, AlreadyExistsError, DataLossError, NotFoundError
from services.buffer.config import OffloadConfig
from services.buffer.files import READ_TOKENS, TokenFile, read_file_ranges, unpack_files
from services.buffer.images import sweep_images
from services.buffer.scripts import Arguments, Durability, ScriptRunner, load_script

CREATE_RUN = load_script("create_run")
READ_RUN = load_script("read_run")
COMMIT_ITERATION = load_script("commit_iteration")
LIST_STATISTICS = load_script("list_statistics")
CREATE_GROUPS = load_script("create_groups")
LIST_GROUPS = load_script("list_groups")
RECORD_VERDICTS = load_script("record_verdicts")
LEASE = load_script("lease")
APPEND = load_script("append")
READ_HEADS = load_script("read_heads")

# Groups that one script call lists: bounds the time that it occupies the server.
GROUPS_PER_CALL = 64
# Trajectories whose heads one script call reads, for the same reason.
HEADS_PER_CALL = 512
# Bytes of tokens and expert choices that one script call reads beyond the first range: bounds the memory of a reply.
BYTES_PER_CALL = 65536 * ITEM_BYTES
# Bytes of a piece, which has fewer tokens than asked for where expert choices would make it larger.
PIECE_BYTES = 2 << 20

CHUNKS = Counter("perigee_buffer_chunks_total", "Chunks received, by outcome.", ["outcome"])
TOKENS_RECEIVED = Counter("perigee_buffer_received_tokens_total", "Tokens in the chunks received.")
TOKENS_READ = Counter("perigee_buffer_read_tokens_total", "Response tokens streamed to readers.")
LEASES = Counter("perigee_buffer_leases_total", "Leases given.")
VERDICTS = Counter("perigee_buffer_verdicts_total", "Verdicts recorded.")
COMMITS = Counter("perigee_buffer_commits_total", "Iterations committed.")


@dataclass(slots=True)
class Piece:
    """Part of a trajectory: its message, before and after the tokens are read, and where these are."""

    message: pb.ReadTrajectoriesResponse
    tokens: int
    # Bytes of a token's expert choices, 0 without them.
    expert_bytes: int
    # Those of the trajectory, which hold its first tokens; the others are in Redis.
    files: list[TokenFile]

    @property
    def bytes(self) -> int:
        """Bytes of its tokens and expert choices."""
        return self.tokens * (ITEM_BYTES + self.expert_bytes)

    @property
    def stop(self) -> int:
        """Response offset after its last token."""
        return self.message.offset + self.tokens

    @property
    def first_stored(self) -> int:
        """Response offset of its first token that is in Redis, or its stop."""
        moved = self.files[-1].stop if self.files else 0
        return min(max(self.message.offset, moved), self.stop)


async def create_run(scripts: ScriptRunner, request: pb.CreateRunRequest) -> pb.CreateRunResponse:
    """Creates the run or confirms it.

    Raises AlreadyExistsError when it exists with another configuration.
    """
    created, *fields = await scripts.run(
        CREATE_RUN,
        request.run_id,
        request.config_digest,
        request.policy_version,
        request.coordinator_state,
        durability=Durability.COMMIT,
    )
    state = _read_run_state(request.run_id, fields)
    if state.config_digest != request.config_digest:
        raise AlreadyExistsError(
            f"run {request.run_id!r} exists with another configuration ({state.config_digest}, not "
            f"{request.config_digest}): take another run id or the configuration it began with"
        )
    return pb.CreateRunResponse(run=state, created=bool(created))


async def get_run(scripts: ScriptRunner, run_id: str) -> pb.RunState:
    """Reads the state of the run; raises NotFoundError."""
    _, *fields = await scripts.run(READ_RUN, run_id)
    return _read_run_state(run_id, fields)


async def commit_iteration(
    scripts: ScriptRunner, request: pb.CommitIterationRequest, retired_s: int = 0
) -> pb.CommitIterationResponse:
    """Closes an iteration, or confirms that this very commit closed it; files of consumed groups last `retired_s`.

    Raises FailedPreconditionError when the iteration is not the next one or a group cannot be consumed, AbortedError
    when the iteration was committed with other contents. A refusal changes nothing.
    """
    run_id = request.run_id
    arguments: Arguments = [
        request.iteration,
        request.policy_version,
        commit_digest(request),
        request.coordinator_state,
        retired_s,
        len(request.consumed_group_ids),
        *request.consumed_group_ids,
    ]
    for increment in request.prompt_increments:
        arguments += (increment.prompt_id, increment.trajectories, increment.correct)
    word, *fields, unreferenced = await scripts.run(COMMIT_ITERATION, run_id, *arguments, durability=Durability.COMMIT)
    if unreferenced:
        await sweep_images(scripts, run_id)
    is_duplicate = word == b"DUPLICATE"
    COMMITS.inc(not is_duplicate)
    return pb.CommitIterationResponse(run=_read_run_state(run_id, fields), duplicate=is_duplicate)


def commit_digest(request: pb.CommitIterationRequest) -> str:
    """Returns what tells a repeated commit from another one of the same iteration."""
    return hashlib.sha256(request.SerializeToString(deterministic=True)).hexdigest()


async def list_statistics(
    scripts: ScriptRunner, run_id: str, page_token: str, limit: int
) -> pb.ListPromptStatisticsResponse:
    """Reads one page of statistics in the order of prompt ids; a page token is the id to start after."""
    _, page_json = await scripts.run(LIST_STATISTICS, run_id, page_token, limit + 1)
    rows = json.loads(page_json)
    response = pb.ListPromptStatisticsResponse()
    for prompt_id, counts in rows[:limit]:
        trajectories, correct = map(int, counts.split())
        response.prompts.add(prompt_id=prompt_id, trajectories=trajectories, correct=correct)
    if len(rows) > limit:
        response.next_page_token = response.prompts[-1].prompt_id
    return response


async def create_groups(scripts: ScriptRunner, run_id: str, groups: Iterable[pb.NewGroup]) -> int:
    """Creates groups with empty trajectories; returns how many did not exist.

    Raises AlreadyExistsError when a new group names a trajectory of another one, FailedPreconditionError when it names
    an image that is not whole; then no group is created.
    """
    arguments: Arguments = []
    for group in groups:
        arguments += (group.group_id, group.prompt_id, group.iteration, group.prompt_token_ids)
        arguments += (" ".join(group.image_digests), len(group.trajectory_ids), *group.trajectory_ids)
    _, value = await scripts.run(CREATE_GROUPS, run_id, *arguments, durability=Durability.SEGMENT)
    return int(value)


async def list_groups(
    scripts: ScriptRunner, run_id: str, page_trajectories: int
) -> AsyncGenerator[pb.ListGroupsResponse, None]:
    """Lists the groups not consumed, oldest first, in pages of at most `page_trajectories` or of one group."""
    page = pb.ListGroupsResponse()
    trajectories = 0
    position = "0"
    while True:
        _, rows_json = await scripts.run(LIST_GROUPS, run_id, position, GROUPS_PER_CALL)
        rows = json.loads(rows_json)
        for row in rows:
            group = _read_group(row)
            if page.groups and trajectories + len(group.trajectories) > page_trajectories:
                yield page
                page, trajectories = pb.ListGroupsResponse(), 0
            page.groups.append(group)
            trajectories += len(group.trajectories)
        if len(rows) < GROUPS_PER_CALL:
            break
        position = rows[-1][0]
    if page.groups:
        yield page


async def record_verdicts(scripts: ScriptRunner, run_id: str, verdicts: Iterable[pb.TrajectoryVerdict]) -> int:
    """Records verdicts, the first of each trajectory; returns how many were not there before.

    Raises NotFoundError for an unknown trajectory, FailedPreconditionError for one that is not finished; then none is
    recorded.
    """
    arguments: Arguments = []
    for item in verdicts:
        arguments += (item.trajectory_id, item.verdict, repr(item.reward) if item.HasField("reward") else "")
    _, value = await scripts.run(RECORD_VERDICTS, run_id, *arguments, durability=Durability.COMMIT)
    VERDICTS.inc(int(value))
    return int(value)


async def lease_trajectories(
    scripts: ScriptRunner, run_id: str, worker_id: str, trajectory_ids: Sequence[str]
) -> list[pb.Lease]:
    """Leases trajectories, which fences every older lease of the same ones.

    Raises NotFoundError for an unknown trajectory, FailedPreconditionError for a finished one; then none is leased.
    """
    _, value = await scripts.run(LEASE, run_id, worker_id, *trajectory_ids, durability=Durability.SEGMENT)
    pairs = [pair.split(":") for pair in value.decode().split(",") if pair]
    LEASES.inc(len(pairs))
    return [
        pb.Lease(trajectory_id=trajectory_id, epoch=int(epoch), tokens=int(tokens))
        for trajectory_id, (epoch, tokens) in zip(trajectory_ids, pairs, strict=True)
    ]


async def append_chunks(
    scripts: ScriptRunner, run_id: str, chunks: Sequence[pb.Chunk], moved_tokens: int = 0
) -> list[pb.AppendOutcome.ValueType]:
    """Appends chunks; returns the outcome of each, in order.

    A trajectory with at least `moved_tokens` tokens in Redis at the end of a segment waits for their move to a file;
    none does at 0.
    """
    arguments: Arguments = [moved_tokens]
    for chunk in chunks:
        arguments += (
            chunk.trajectory_id,
            chunk.epoch,
            chunk.offset,
            chunk.token_ids,
            chunk.logprobs,
            pack_spans(chunk.versions, chunk.offset),
            chunk.end_reason,
            chunk.experts,
        )
    ends = any(chunk.end_reason for chunk in chunks)
    durability = Durability.SEGMENT if ends else Durability.NONE
    _, digits = await scripts.run(APPEND, run_id, *arguments, durability=durability)
    outcomes = [pb.AppendOutcome.ValueType(int(digit)) for digit in digits.decode()]
    TOKENS_RECEIVED.inc(sum(count_tokens(chunk.token_ids) for chunk in chunks))
    for outcome in outcomes:
        CHUNKS.labels(pb.AppendOutcome.Name(outcome).removeprefix("APPEND_OUTCOME_").lower()).inc()
    return outcomes


async def read_trajectories(
    scripts: ScriptRunner, request: pb.ReadTrajectoriesRequest, piece_tokens: int, offload: OffloadConfig
) -> AsyncGenerator[pb.ReadTrajectoriesResponse, None]:
    """Reads every trajectory in pieces of at most `piece_tokens` tokens and 2 MiB, in the order asked for.

    Raises NotFoundError for an unknown trajectory, AbortedError when one is consumed while it is read, and
    UnavailableError when the storage of its file cannot be reached.
    """
    for start in range(0, len(request.trajectory_ids), HEADS_PER_CALL):
        ids = request.trajectory_ids[start : start + HEADS_PER_CALL]
        heads = await _read_heads(scripts, request.run_id, ids)
        # Pieces are made as they are needed, and let go of: those of many long trajectories are all of their tokens.
        for batch in _batch(_make_pieces(ids, heads, piece_tokens, request.with_experts)):
            await _read_batch(scripts, request.run_id, batch, request.with_logprobs, offload)
            for piece in batch:
                TOKENS_READ.inc(piece.tokens)
                yield piece.message


def pack_spans(spans: Iterable[pb.VersionSpan], offset: int) -> str:
    """Returns spans that begin at a response offset as `version:stop,...`, empty ones left out."""
    pieces = []
    for span in spans:
        offset += span.tokens
        if span.tokens:
            pieces.append(f"{span.policy_version}:{offset}")
    return ",".join(pieces)


def unpack_spans(versions: str, first: int, last: int) -> list[pb.VersionSpan]:
    """Returns the spans of the tokens from `first` up to `last`; inverts `pack_spans` with offset `first`."""
    spans: list[pb.VersionSpan] = []
    for piece in versions.split(",") if versions else ():
        version, _, stop_text = piece.partition(":")
        stop = min(int(stop_text), last)
        if stop > first:
            spans.append(pb.VersionSpan(policy_version=int(version), tokens=stop - first))
            first = stop
    return spans


@dataclass(frozen=True)
class _Heads:
    """What is known of trajectories before their tokens: a row each, and the prompts of their groups end to end."""

    rows: Sequence[Any]
    prompts: bytes
    prompt_sizes: Sequence[int]
    # Digests of each prompt's images, with blanks between them.
    images: Sequence[str]


async def _read_heads(scripts: ScriptRunner, run_id: str, trajectory_ids: Sequence[str]) -> _Heads:
    """Reads the heads of trajectories; raises NotFoundError for an unknown one."""
    _, page_json, prompts = await scripts.run(READ_HEADS, run_id, *trajectory_ids)
    rows, prompt_sizes, images = json.loads(page_json)
    return _Heads(rows, prompts, prompt_sizes, images)


def _make_pieces(
    trajectory_ids: Sequence[str], heads: _Heads, piece_tokens: int, with_experts: bool
) -> Iterator[Piece]:
    """Yields the pieces of trajectories, one of each at least, before their tokens are read."""
    ends = list(accumulate(heads.prompt_sizes))
    for trajectory_id, (prompt, tokens_text, epoch, ending, versions, choices, held) in zip(
        trajectory_ids, heads.rows, strict=True
    ):
        tokens, expert_bytes, files = int(tokens_text), int(choices) if with_experts else 0, unpack_files(held)
        step = min(piece_tokens, max(1, PIECE_BYTES // (2 * ITEM_BYTES + expert_bytes)))
        for first in range(0, max(tokens, 1), step):
            last = min(first + step, tokens)
            message = pb.ReadTrajectoriesResponse(
                trajectory_id=trajectory_id,
                offset=first,
                versions=unpack_spans(versions, first, last),
                last=last == tokens,
                end_reason=pb.EndReason.ValueType(int(ending)),
                epoch=int(epoch),
            )
            if first == 0:
                message.prompt_token_ids = heads.prompts[ends[prompt] - heads.prompt_sizes[prompt] : ends[prompt]]
                message.image_digests.extend(heads.images[prompt].split())
            yield Piece(message, last - first, expert_bytes, files)


def _batch(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Yields pieces in batches that one script call reads."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        if batch and size + piece.bytes > BYTES_PER_CALL:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += piece.bytes
    if batch:
        yield batch


async def _read_batch(
    scripts: ScriptRunner, run_id: str, batch: Sequence[Piece], with_logprobs: bool, offload: OffloadConfig
) -> None:
    """Fills in the tokens of pieces, from Redis together, from files one by one."""
    stored = [piece for piece in batch if piece.first_stored < piece.stop]
    while stored and not await _read_stored(scripts, run_id, stored, with_logprobs):
        # Some were moved to a file meanwhile, or are gone with their group; others may be moved in the next moment.
        before = [piece.first_stored for piece in stored]
        await _find_files(scripts, run_id, stored)
        if [piece.first_stored for piece in stored] == before:
            raise AbortedError(f"a trajectory of run {run_id!r} was consumed while it was read")
        stored = [piece for piece in stored if piece.first_stored < piece.stop]
    for piece in batch:
        if piece.message.offset < piece.first_stored:
            await _read_from_files(scripts, run_id, piece, with_logprobs, offload)


async def _read_stored(scripts: ScriptRunner, run_id: str, batch: Sequence[Piece], with_logprobs: bool) -> bool:
    """Fills in those tokens of pieces that are in Redis; returns whether all of them were there."""
    arguments: Arguments = [int(with_logprobs)]
    for piece in batch:
        arguments += (piece.message.trajectory_id, piece.first_stored, piece.stop, piece.expert_bytes)
    _, token_ids, logprobs, experts = await scripts.run(READ_TOKENS, run_id, *arguments)
    counts = [piece.stop - piece.first_stored for piece in batch]
    sizes = [count * piece.expert_bytes for count, piece in zip(counts, batch, strict=True)]
    if (len(token_ids), len(experts)) != (sum(counts) * ITEM_BYTES, sum(sizes)):
        return False
    start = expert_start = 0
    for piece, count, size in zip(batch, counts, sizes, strict=True):
        end, expert_end = start + count * ITEM_BYTES, expert_start + size
        piece.message.token_ids, piece.message.logprobs = token_ids[start:end], logprobs[start:end]
        piece.message.experts = experts[expert_start:expert_end]
        start, expert_start = end, expert_end
    return True


async def _find_files(scripts: ScriptRunner, run_id: str, batch: Sequence[Piece]) -> None:
    """Looks up again which files the trajectories of pieces have; raises AbortedError when a trajectory is gone."""
    ids = list(dict.fromkeys(piece.message.trajectory_id for piece in batch))
    try:
        heads = await _read_heads(scripts, run_id, ids)
    except NotFoundError as error:
        raise AbortedError(f"a trajectory of run {run_id!r} was consumed while it was read") from error
    files = {trajectory_id: unpack_files(row[-1]) for trajectory_id, row in zip(ids, heads.rows, strict=True)}
    for piece in batch:
        piece.files = files[piece.message.trajectory_id]


async def _read_from_files(
    scripts: ScriptRunner, run_id: str, piece: Piece, with_logprobs: bool, offload: OffloadConfig
) -> None:
    """Puts those tokens of a piece that are in files before the others.

    Raises AbortedError when its group was consumed, DataLossError when it was not.
    """
    message, parts = piece.message, []
    for file in piece.files:
        first, stop = max(file.first, message.offset), min(file.stop, piece.stop)
        if first < stop:
            ranges = file.find_ranges(first, stop, with_logprobs=with_logprobs, expert_bytes=piece.expert_bytes)
            try:
                parts.append(await asyncio.to_thread(read_file_ranges, offload, run_id, file.name, ranges))
            except DataLossError:
                await _find_files(scripts, run_id, [piece])
                raise
    parts.append([message.token_ids, message.logprobs, message.experts])
    message.token_ids, message.logprobs, message.experts = (b"".join(each) for each in zip(*parts, strict=True))


def _read_run_state(run_id: str, fields: Sequence[Any]) -> pb.RunState:
    digest, iteration, policy_version, coordinator_state = fields
    return pb.RunState(
        run_id=run_id,
        config_digest=digest.decode(),
        iteration=int(iteration),
        policy_version=int(policy_version),
        coordinator_state=bytes(coordinator_state),
    )


def _read_group(row: Sequence[Any]) -> pb.GroupSummary:
    _, group_id, prompt_id, iteration, trajectories = row
    return pb.GroupSummary(
        group_id=group_id,
        prompt_id=prompt_id,
        iteration=int(iteration),
        trajectories=[_read_summary(fields) for fields in trajectories],
    )


def _read_summary(fields: Sequence[str]) -> pb.TrajectorySummary:
    trajectory_id, tokens, epoch, ending, verdict, reward, versions = fields
    end_reason = pb.EndReason.ValueType(int(ending))
    if end_reason not in UNFINISHED:
        state = pb.TRAJECTORY_STATE_FINISHED
    else:
        end_reason = pb.END_REASON_UNSPECIFIED
        state = pb.TRAJECTORY_STATE_PARTIAL if int(tokens) else pb.TRAJECTORY_STATE_PENDING
    return pb.TrajectorySummary(
        trajectory_id=trajectory_id,
        state=state,
        tokens=int(tokens),
        epoch=int(epoch),
        end_reason=end_reason,
        verdict=pb.Verdict.ValueType(int(verdict or 0)),
        reward=float(reward) if reward else None,
        versions=unpack_spans(versions, 0, int(tokens)),
    )
